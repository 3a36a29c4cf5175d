"""LightKV: prompt-guided compression of vision tokens during prefill, for stock Hugging Face models.

with lightkv.compress(model, LightKVConfig.for_model(model.config, retention=0.55)) as report:
    model.generate(**inputs)
"""

from lightkv.attach import compress
from lightkv.config import LightKVConfig, Stage
from lightkv.cost import Cost, estimate
from lightkv.errors import ConfigError, LightKVError, UnsupportedCallError, UnsupportedModelError
from lightkv.families import family_of
from lightkv.guidance import prompt_guidance
from lightkv.layout import VisionLayout
from lightkv.report import Report
from lightkv.stage import Compressed, compress_tokens

__all__ = [
    "Compressed",
    "ConfigError",
    "Cost",
    "LightKVConfig",
    "LightKVError",
    "Report",
    "Stage",
    "UnsupportedCallError",
    "UnsupportedModelError",
    "VisionLayout",
    "compress",
    "compress_tokens",
    "estimate",
    "family_of",
    "prompt_guidance",
]
