"""The linear probe's BatchNorm: alone as torch's, and in two processes as one process that has all rows."""

import copy
import datetime
from pathlib import Path

import torch
import torch.distributed as dist
import torch.multiprocessing
from torch import nn

from mae_core.classifier import BatchNorm

WIDTH = 5


def batches(seed: int = 0) -> list[torch.Tensor]:
    """Three batches of 8 rows, far from 0, and different in their halves."""
    generator = torch.Generator().manual_seed(seed)
    offset = torch.cat([torch.full((4, 1), 100.0), torch.full((4, 1), 103.0)])
    return [torch.randn(8, WIDTH, generator=generator) + offset for _ in range(3)]


def run_rank(rank: int, folder: str) -> None:
    store, limit = f"file://{folder}/store", datetime.timedelta(seconds=120)
    dist.init_process_group("gloo", init_method=store, rank=rank, world_size=2, timeout=limit)
    norm = BatchNorm(WIDTH)
    outputs = [norm(batch[4 * rank : 4 * rank + 4]) for batch in batches()]
    # Of the last batch one rank has a row less.
    counts_B = torch.tensor([True, True, True, rank == 0])
    outputs.append(norm(batches()[2][4 * rank : 4 * rank + 4], counts_B))
    outputs.append(norm.eval()(batches()[0]))
    torch.save((outputs, norm.state_dict()), Path(folder) / f"rank-{rank}.pt")
    dist.destroy_process_group()


def test_two_processes_are_one_with_all_rows(tmp_path, monkeypatch):
    monkeypatch.setenv("GLOO_SOCKET_IFNAME", "lo")
    other = torch.multiprocessing.get_context("spawn").Process(target=run_rank, args=(1, str(tmp_path)), daemon=True)
    other.start()
    run_rank(0, str(tmp_path))
    other.join()
    whole = nn.BatchNorm1d(WIDTH, affine=False, eps=1e-6)
    expected = [whole(batch) for batch in batches()]
    expected.append(whole(batches()[2][:7]))
    shares = [torch.load(tmp_path / f"rank-{rank}.pt") for rank in range(2)]
    for i, output in enumerate(expected):
        together = torch.cat([outputs[i] for outputs, _ in shares])[: len(output)]
        torch.testing.assert_close(together, output, rtol=1e-4, atol=1e-4)
    for outputs, state in shares:
        torch.testing.assert_close(state, dict(whole.state_dict()), rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(outputs[4], copy.deepcopy(whole).eval()(batches()[0]), rtol=1e-4, atol=1e-4)


def test_alone_it_is_torchs():
    ours, theirs = BatchNorm(WIDTH), nn.BatchNorm1d(WIDTH, affine=False, eps=1e-6)
    for batch in batches():
        assert torch.equal(ours(batch), theirs(batch))
    theirs.load_state_dict(ours.state_dict(), strict=True)


def test_rows_that_fill_up_a_batch_are_left_out_of_the_statistics():
    ours, theirs = BatchNorm(WIDTH), nn.BatchNorm1d(WIDTH, affine=False, eps=1e-6)
    counts_B = torch.arange(8) % 3 != 2
    for batch in batches():
        filled = batch.clone()
        filled[~counts_B] = 1e3
        torch.testing.assert_close(ours(filled, counts_B)[counts_B], theirs(batch[counts_B]), rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(ours.state_dict(), theirs.state_dict(), rtol=1e-5, atol=1e-5)


def test_a_batch_of_nothing_is_forgotten():
    norm = BatchNorm(WIDTH)
    before = copy.deepcopy(norm.state_dict())
    assert norm(batches()[0], torch.zeros(8, dtype=torch.bool)).isfinite().all()
    after = norm.state_dict()
    assert all(torch.equal(after[name], before[name]) for name in ("running_mean", "running_var"))
