"""LightKV: compression of vision tokens during prefill, for stock Hugging Face models.

with lightkv.compress(model, LightKVConfig.for_model(model.config, retention=0.55)) as report:
    model.generate(**inputs)
"""

from lightkv.attach import compress
from lightkv.baselines import baseline
from lightkv.config import LightKVConfig, Stage
from lightkv.cost import Cost, estimate
from lightkv.engine import Engine, Memory
from lightkv.errors import ConfigError, LightKVError, UnsupportedCallError, UnsupportedModelError
from lightkv.families import family_of
from lightkv.guidance import prompt_guidance
from lightkv.layerkv import Bits
from lightkv.layout import VisionLayout
from lightkv.report import Report, Survivors
from lightkv.request import Generated, Request, Result
from lightkv.segments import Segment, Text, Vision
from lightkv.stage import compress_tokens
from lightkv.tokens import Compressed, Tokens

__all__ = [
    "Bits",
    "Compressed",
    "ConfigError",
    "Cost",
    "Engine",
    "Generated",
    "LightKVConfig",
    "LightKVError",
    "Memory",
    "Report",
    "Request",
    "Result",
    "Segment",
    "Stage",
    "Survivors",
    "Text",
    "Tokens",
    "UnsupportedCallError",
    "UnsupportedModelError",
    "Vision",
    "VisionLayout",
    "baseline",
    "compress",
    "compress_tokens",
    "estimate",
    "family_of",
    "prompt_guidance",
]
