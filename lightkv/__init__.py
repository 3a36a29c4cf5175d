"""LightKV compresses the vision tokens of stock Hugging Face models during prefill.

with lightkv.compress(model, LightKVConfig.for_model(model.config, retention=0.55)) as report:
    model.generate(**inputs)
"""

from lightkv.cost import Cost, estimate
from lightkv.engine.engine import Engine
from lightkv.engine.layerkv import Bits
from lightkv.engine.memory import Memory
from lightkv.engine.request import Generated, Request, Result
from lightkv.engine.segments import Segment, Text, Vision
from lightkv.errors import ConfigError, LightKVError, UnsupportedCallError, UnsupportedModelError
from lightkv.hooks.compress import compress
from lightkv.hooks.report import Report, Survivors
from lightkv.methods.baselines import baseline
from lightkv.methods.config import LightKVConfig
from lightkv.methods.guidance import prompt_guidance
from lightkv.methods.published import compress_tokens
from lightkv.methods.settings import Stage
from lightkv.vision.families import family_of
from lightkv.vision.layout import VisionLayout
from lightkv.vision.tokens import Compressed, Tokens

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
