"""What is done to batches of images: shares, places and targets agree."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

from vix_kernels.training.augment import mix, random_erasing


@pytest.fixture(autouse=True)
def seed() -> None:
    torch.manual_seed(0)


def test_erasing_sets_one_rectangle_of_the_drawn_size() -> None:
    images = torch.ones(400, 3, 24, 16)
    erased = random_erasing(images, 1.0) == 0
    assert torch.equal(erased.any(1), erased.all(1))  # all channels
    area = erased[:, 0].flatten(1).float().mean(1)
    assert 0.005 < area.min() and area.max() < 0.36 and 0.1 < area.mean() < 0.2
    rows, columns = erased[:, 0].any(2).sum(1), erased[:, 0].any(1).sum(1)
    assert torch.equal(rows * columns, erased[:, 0].flatten(1).sum(1))  # a rectangle
    assert erased[:, 0].any(0).all()  # anywhere
    assert torch.equal(images, torch.ones_like(images))
    some = (random_erasing(images, 0.25) == 0).flatten(1).any(1).float().mean()
    assert 0.15 < some < 0.35
    assert torch.equal(random_erasing(images, 0.0), images)


def test_mixup_blends_images_as_it_blends_targets() -> None:
    images, labels = torch.rand(6, 3, 8, 8), torch.tensor([0, 1, 2, 0, 1, 2])
    mixed, targets = mix(images, labels, 4, mixup=1.0, cutmix=0.0)
    share = targets[0, 0].item()
    assert 0 < share < 1 and targets[0, 2].item() == pytest.approx(1 - share)
    torch.testing.assert_close(mixed, share * images + (1 - share) * images.flip(0))
    torch.testing.assert_close(targets.sum(1), torch.ones(6))


def test_cutmix_takes_as_many_pixels_as_it_takes_of_the_target() -> None:
    images = torch.arange(2.0).view(2, 1, 1, 1).expand(2, 3, 16, 8).contiguous()
    seen = set()
    for _ in range(50):
        mixed, targets = mix(images, torch.tensor([0, 1]), 2, mixup=0.0, cutmix=1.0)
        taken = mixed[0, 0]  # 1 where it comes from the other
        assert taken.mean().item() == pytest.approx(targets[0, 1].item())
        rows, columns = taken.any(1).sum(), taken.any(0).sum()
        assert rows * columns == taken.sum()
        assert torch.equal(mixed[1], 1 - mixed[0])
        seen.add(int(taken.sum()))
    assert len(seen) > 10 and not images[0].any()


def test_both_take_turns() -> None:
    images = torch.arange(2.0).view(2, 1, 1, 1).expand(2, 1, 8, 8).contiguous()
    whole = [
        bool(((mixed == 0) | (mixed == 1)).all())
        for mixed, _ in (mix(images, torch.tensor([0, 1]), 2, mixup=1.0, cutmix=1.0) for _ in range(60))
    ]
    assert 15 < sum(whole) < 45


@pytest.mark.parametrize(
    "flag, value", [("--mixup", "-1"), ("--cutmix", "nan"), ("--reprob", "1.5"), ("--model-ema-decay", "1")]
)
def test_bad_strengths_are_refused(flag: str, value: str, refused: Callable[..., str]) -> None:
    assert flag in refused(f"{flag}={value}")
