from __future__ import annotations

from pathlib import Path

import torch

from longalign_ray.train.engine import quiet_deepspeed


def check_copies(directory: Path, *, device: str) -> None:
    """Files hold what there was at `save`, whatever training did before `write`; twice, as the memory is used again."""
    quiet_deepspeed()
    from longalign_ray.train.async_checkpoint import CopyThenWrite

    writer, weights = CopyThenWrite(None), torch.arange(6.0, device=device)
    for number in (1, 2):
        file, before = directory / f"{number}.pt", weights.tolist()
        writer.save({"weights": weights, "of them": weights[2:4], "step": number}, str(file))
        assert not file.exists()
        weights += 10
        writer.write()
        read = torch.load(file, weights_only=True)
        assert read["weights"].device.type == "cpu"
        assert read["weights"].tolist() == before
        assert read["of them"].tolist() == before[2:4]
        assert read["step"] == number
    writer.write()
    assert len(list(directory.iterdir())) == 2


def test_files_hold_what_there_was_when_training_went_on(tmp_path: Path) -> None:
    check_copies(tmp_path, device="cpu")
