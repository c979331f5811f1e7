"""What arrives on the device is what was sent, whatever the device is still busy with."""

import numpy as np
import pytest
import torch

from mae_core.randomness import mask_keys
from pipelines.data.readers import MicroBatch
from pipelines.training.upload import Upload


def micro_batch(index, rows=8, side=32):
    rng = np.random.default_rng(index)
    images_BHWC = rng.integers(0, 256, (rows, side, side, 3), np.uint8)
    images_BHWC.flags.writeable = False  # as it lies in the object store
    sample_B, epoch_B = np.arange(rows) + rows * index, np.full(rows, index)
    weight_B = rng.integers(0, 2, rows).astype(np.float32)
    return MicroBatch(index, 0, images_BHWC, sample_B, epoch_B, epoch_B, weight_B, [])


@pytest.mark.parametrize("kind", ["cpu", "cuda"])
def test_micro_batches_arrive_whole(kind):
    if kind == "cuda" and not torch.cuda.is_available():
        pytest.skip("no GPU")
    device = torch.device(kind)
    upload, busy = Upload(device, seed=3), torch.randn(2048, 2048, device=device)
    upload(micro_batch(0))  # makes its room
    kept = []
    if kind == "cuda":
        torch.cuda.set_sync_debug_mode("error")
    try:
        for index in range(1, 9):
            there = upload(micro_batch(index))
            if kind == "cuda":
                for _ in range(20):
                    busy = (busy @ busy).clamp(-1, 1)  # the device falls behind
            kept.append([part.clone() for part in (there.images_BHWC, there.keys_B, there.weight_B)])
    finally:
        if kind == "cuda":
            torch.cuda.set_sync_debug_mode("default")
    for index, parts in enumerate(kept, 1):
        batch = micro_batch(index)
        keys_B = mask_keys(3, batch.epoch_B, batch.sample_B, 0)
        for part, sent in zip(parts, (batch.images_BHWC, keys_B.numpy(), batch.weight_B), strict=True):
            assert part.device.type == kind
            np.testing.assert_array_equal(part.cpu().numpy(), sent)
