"""Encodes frames as vision tokens, per model family: sizes, token grids, normalisation and patches on the device.

Frames stay uint8 until they reach the device. A video is encoded batch by batch as its frames arrive, so only vision
tokens accumulate in memory, never frames. The arithmetic equals that of the families' own image processors.
"""

from collections.abc import Iterable, Iterator
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor

from lightkv import Vision
from pipeline.config import Frames
from pipeline.decoding.frames import Sizing
from pipeline.errors import ConfigError


class FrameEncoder:
    """Encodes frames for one family of models; one subclass per way of making tokens."""

    temporal_patch: ClassVar[int] = 1  # frames per time step

    def __init__(self, config: Any, preprocessor: dict[str, Any]) -> None:
        self.config = config
        self.preprocessor = preprocessor
        self.repeat_tolerance: float | None = None  # Frames.repeat_tolerance; only some encoders use it
        self.images_together = 16  # images of a set per call of the vision tower

    def sizing(self, frames: Frames) -> Sizing:
        """The frame sizes that the model accepts under these settings."""
        raise NotImplementedError

    def grid(self, frames: int, height: int, width: int) -> tuple[int, int, int]:
        """Token grid (t, y, x) of `frames` frames of `height` × `width` pixels."""
        raise NotImplementedError

    def positions(self, grids: Iterable[tuple[int, int, int]]) -> int:
        """How many positions of the model's context the items take."""
        raise NotImplementedError

    def modality(self, kind: str) -> str:
        """Which placeholder (video | image) represents the items of a unit of this kind (video | images)."""
        raise NotImplementedError

    def parts(self, model: Any, kind: str, items: Iterable[tuple[int, np.ndarray] | None]) -> Iterator[Vision | None]:
        """Yield vision tokens of a unit as its frames arrive: (item, uint8 [T, H, W, 3]) in order, batch by batch.

        `items` yields None while the next frames are not ready, and so does this.
        """
        raise NotImplementedError

    def pixels(self, frames: np.ndarray, device: torch.device) -> Tensor:
        """Frames uint8 [T, H, W, 3] as normalised float32 [T, 3, H, W] on the device."""
        mean = torch.tensor(self.preprocessor["image_mean"], device=device).view(3, 1, 1)
        std = torch.tensor(self.preprocessor["image_std"], device=device).view(3, 1, 1)
        scale = self.preprocessor.get("rescale_factor", 1 / 255)
        # Ray returns read-only views; torch needs writable memory.
        tensor = torch.from_numpy(np.array(frames, copy=True)).to(device).permute(0, 3, 1, 2).float()
        return (tensor * scale - mean) / std


class QwenEncoder(FrameEncoder):
    """Qwen2-VL, Qwen2.5-VL: frame sides in multiples of patch × merge, two frames per time step, 3-D positions."""

    def __init__(self, config: Any, preprocessor: dict[str, Any]) -> None:
        super().__init__(config, preprocessor)
        vision = config.vision_config
        self.patch, self.merge = vision.patch_size, vision.spatial_merge_size
        self.temporal_patch = vision.temporal_patch_size  # type: ignore[misc]

    def sizing(self, frames: Frames) -> Sizing:
        size = self.preprocessor.get("size") or {}
        least = self.preprocessor.get("min_pixels") or size.get("shortest_edge") or 1
        most = self.preprocessor.get("max_pixels") or size.get("longest_edge") or frames.max_px
        min_px, max_px = max(frames.min_px, least), min(frames.max_px, most)
        if min_px > max_px:
            raise ConfigError(
                f"frames.min_px {frames.min_px}, frames.max_px {frames.max_px}: the model takes frames of {least} to "
                f"{most} pixels, and no size fits both"
            )
        return Sizing(multiple=self.patch * self.merge, min_px=min_px, max_px=max_px)

    def grid(self, frames: int, height: int, width: int) -> tuple[int, int, int]:
        cell = self.patch * self.merge
        return -(-frames // self.temporal_patch), height // cell, width // cell

    def positions(self, grids: Iterable[tuple[int, int, int]]) -> int:
        return sum(max(grid) for grid in grids)

    def modality(self, kind: str) -> str:
        return "image" if kind == "images" else "video"

    def parts(self, model: Any, kind: str, items: Iterable[tuple[int, np.ndarray] | None]) -> Iterator[Vision | None]:
        if kind == "images":
            yield from self._images(model, items)
            return
        steps = 0
        for batch in _rechunk(items, self.temporal_patch):
            if batch is None:
                yield None
                continue
            frames, counts = self._without_repeats(batch[1])
            (features,), (grid,) = self._tower(model, [frames])
            yield Vision(features, grid, steps, counts)
            steps += sum(counts) if counts is not None else grid[0]

    def _images(self, model: Any, items: Iterable[tuple[int, np.ndarray] | None]) -> Iterator[Vision | None]:
        for images in _grouped(items, self.images_together):
            if images is None:
                yield None
                continue
            repeated = [np.repeat(image, self.temporal_patch, axis=0) for image in images]
            for features, grid in zip(*self._tower(model, repeated), strict=True):
                yield Vision(features, grid)

    def _without_repeats(self, frames: np.ndarray) -> tuple[np.ndarray, tuple[int, ...] | None]:
        """Frames [T, H, W, 3] without time steps that repeat the last kept one, and the step count of each kept one."""
        if self.repeat_tolerance is None:
            return frames, None
        kept, counts = [0], [1]
        steps = frames.reshape(-1, self.temporal_patch, *frames.shape[1:])
        cell = self.patch * self.merge
        for number in range(1, len(steps)):
            apart = np.abs(steps[number].astype(np.int16) - steps[kept[-1]].astype(np.int16))
            _, height, width, _ = apart.shape
            patches = apart.reshape(-1, height // cell, cell, width // cell, cell, 3).mean(axis=(0, 2, 4, 5))
            if patches.max() <= self.repeat_tolerance:
                counts[-1] += 1
            else:
                kept.append(number)
                counts.append(1)
        return steps[kept].reshape(-1, *frames.shape[1:]), tuple(counts)

    def _tower(self, model: Any, items: list[np.ndarray]) -> tuple[list[Tensor], list[tuple[int, int, int]]]:
        """Features and token grids of items [T, H, W, 3] in one call; T must be a multiple of the temporal patch.

        The tower's attention crosses neither items nor temporal patches, so encoding a video in batches is exact.
        """
        patches, grids = zip(*(self.patchify(self.pixels(frames, model.device)) for frames in items), strict=True)
        grid_thw = torch.tensor(grids, device=model.device)
        together = torch.cat(patches).to(model.dtype)
        features = list(model.get_video_features(together, grid_thw, return_dict=True).pooler_output)
        return features, [(t, h // self.merge, w // self.merge) for t, h, w in grids]

    def patchify(self, pixels: Tensor) -> tuple[Tensor, tuple[int, int, int]]:
        """[T, 3, H, W] to patches [t·h·w, 3·pt·p·p] in the tower's order (merge windows together), and (t, h, w)."""
        frames, channels, height, width = pixels.shape
        t, h, w = frames // self.temporal_patch, height // self.patch, width // self.patch
        m, p = self.merge, self.patch
        blocks = pixels.reshape(t, self.temporal_patch, channels, h // m, m, p, w // m, m, p)
        blocks = blocks.permute(0, 3, 6, 4, 7, 2, 1, 5, 8)  # t, y, x, y in window, x in window, channel, pt, p, p
        return blocks.reshape(t * h * w, channels * self.temporal_patch * p * p), (t, h, w)


class LlavaEncoder(FrameEncoder):
    """LLaVA-1.5: each frame is an image, cropped to the tower's square; 1-D positions."""

    def __init__(self, config: Any, preprocessor: dict[str, Any]) -> None:
        super().__init__(config, preprocessor)
        crop = preprocessor.get("crop_size") or {}
        self.side = crop.get("height") or config.vision_config.image_size
        self.cells = self.side // config.vision_config.patch_size

    def sizing(self, frames: Frames) -> Sizing:
        return Sizing.square(self.side)

    def grid(self, frames: int, height: int, width: int) -> tuple[int, int, int]:
        return frames, self.cells, self.cells

    def positions(self, grids: Iterable[tuple[int, int, int]]) -> int:
        return sum(t * y * x for t, y, x in grids)

    def modality(self, kind: str) -> str:
        return "image"

    def parts(self, model: Any, kind: str, items: Iterable[tuple[int, np.ndarray] | None]) -> Iterator[Vision | None]:
        for images in _grouped(items, self.images_together if kind == "images" else 1):
            if images is None:
                yield None
                continue
            pixels = self.pixels(np.concatenate(images), model.device).to(model.dtype)
            for features in model.get_image_features(pixel_values=pixels, return_dict=True).pooler_output:
                yield Vision(features, (1, self.cells, self.cells))


ENCODERS: dict[str, type[FrameEncoder]] = {
    "qwen2_vl": QwenEncoder,
    "qwen2_5_vl": QwenEncoder,
    "llava": LlavaEncoder,
}


def encoder_for(config: Any, preprocessor: dict[str, Any]) -> FrameEncoder:
    """The frame encoder of a model; raises `ConfigError` for a family without one."""
    encoder = ENCODERS.get(config.model_type)
    if encoder is None:
        raise ConfigError(f"model type {config.model_type}: the pipeline feeds frames to {', '.join(ENCODERS)} only")
    return encoder(config, preprocessor)


def _grouped(items: Iterable[tuple[int, np.ndarray] | None], count: int) -> Iterator[list[np.ndarray] | None]:
    """Yield images in groups of `count`; the last group may be smaller. Yields None while the next image is not ready.

    Groups do not depend on when images arrive, so neither do the tower's results.
    """
    group: list[np.ndarray] = []
    for item in items:
        if item is None:
            yield None
            continue
        group.append(item[1])
        if len(group) == count:
            yield group
            group = []
    if group:
        yield group


def _rechunk(
    batches: Iterable[tuple[int, np.ndarray] | None], multiple: int
) -> Iterator[tuple[int, np.ndarray] | None]:
    """The same frames in batches of a multiple of `multiple`; the last frame is repeated to fill the last batch."""
    rest: np.ndarray | None = None
    for batch in batches:
        if batch is None:
            yield None
            continue
        item, frames = batch
        frames = frames if rest is None else np.concatenate([rest, frames])
        whole = len(frames) - len(frames) % multiple
        if whole:
            yield item, frames[:whole]
        rest = frames[whole:].copy() if whole < len(frames) else None
    if rest is not None:
        yield 0, np.concatenate([rest, np.repeat(rest[-1:], multiple - len(rest), axis=0)])
