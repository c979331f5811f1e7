"""Reconstructions of a run's own images: masked, reconstructed, original."""

from pathlib import Path

import numpy as np
import torch

from mae_core.images import normalize
from mae_core.model import MaskedAutoencoder
from mae_core.pictures import reconstruction_sheet
from mae_core.randomness import mask_keys
from pipelines.config import Config
from pipelines.data.plan import Cut, Plan
from pipelines.data.readers import Stream, View, read_images
from pipelines.data.shards import Manifest


@torch.inference_mode()
def save_reconstructions(model: MaskedAutoencoder, config: Config, images: Manifest, view: View, path: Path) -> bool:
    """Draws some images, always the same with the same masks, and writes a PNG.

    Args:
        model: The model, in any mode.
        config: The run's configuration.
        images: Where the images come from.
        view: Size and crop.
        path: The picture's file.

    Returns:
        Whether there was anything to draw.
    """
    num = min(config.log.pictures, images.num_samples)
    stream = Stream(images, Plan(images.num_samples, config.run.seed), Cut(num, num, 1), view)
    batch = read_images(stream, 0)
    good = np.flatnonzero(batch.weight_B)
    if not len(good):
        return False
    device = next(model.parameters()).device
    images_BCHW = normalize(torch.from_numpy(batch.images_BHWC[good]).to(device), config.data.mean, config.data.std)
    keys_B = mask_keys(config.run.seed, np.zeros_like(good), batch.sample_B[good]).to(device)
    out = model(images_BCHW, model.masking.noise(keys_B))
    sheet = reconstruction_sheet(
        images_BCHW.cpu(),
        out["pred"].float().cpu(),
        out["masked"].cpu(),
        patch_size=model.patch_size,
        mean=config.data.mean,
        std=config.data.std,
        target=model.target,
    )
    path.parent.mkdir(parents=True, exist_ok=True)
    sheet.save(path)
    return True
