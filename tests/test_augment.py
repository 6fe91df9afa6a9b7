"""Tests of augmentation on image batches: the sizes and positions of the changed areas, and the targets of mixed images."""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image, ImageEnhance, ImageOps

from vix_kernels.training.augment import mix, random_affine, random_erasing, random_flip_crop, random_resized_crop
from vix_kernels.training.draws import Draws
from vix_kernels.training.parallel import Ranks
from vix_kernels.training.trivial import OPERATIONS, Operation, trivial_augment


def test_numbers_are_below_the_upper_limit(monkeypatch: pytest.MonkeyPatch) -> None:
    draws = Draws(0, images=3)
    monkeypatch.setattr(draws, "batch", SimpleNamespace(uniform=lambda low, high, size: np.full(size, high - 1e-12)))
    assert (draws.uniform() < 1).all() and (draws.uniform(-3, 2) < 2).all() and draws.chance(1.0).all()


def test_erasing_sets_one_rectangle_of_the_drawn_size() -> None:
    images = torch.ones(400, 3, 24, 16)
    draws = Draws(0, images=400)
    erased = random_erasing(images, draws, 1.0) == 0
    assert torch.equal(erased.any(1), erased.all(1))  # all channels are erased together
    area = erased[:, 0].flatten(1).float().mean(1)
    assert 0.005 < area.min() and area.max() < 0.36 and 0.1 < area.mean() < 0.2
    rows, columns = erased[:, 0].any(2).sum(1), erased[:, 0].any(1).sum(1)
    assert torch.equal(rows * columns, erased[:, 0].flatten(1).sum(1))  # the erased area is a rectangle
    assert erased[:, 0].any(0).all()  # every pixel is erased in some image
    assert torch.equal(images, torch.ones_like(images))
    some = (random_erasing(images, draws, 0.25) == 0).flatten(1).any(1).float().mean()
    assert 0.15 < some < 0.35
    assert torch.equal(random_erasing(images, draws, 0.0), images)


def test_crops_have_the_drawn_size_and_any_position() -> None:
    y, x = torch.meshgrid(torch.linspace(-1, 1, 33), torch.linspace(-1, 1, 17), indexing="ij")
    images = torch.stack([x, y]).expand(500, 2, 33, 17)  # the value of a pixel is its position
    cropped = random_resized_crop(images, Draws(0, images=500), scale=0.35)
    first, last = cropped[:, :, 2, 2], cropped[:, :, -3, -3]  # near two corners; at the border, pixels are repeated
    width, height = ((last - first) / torch.tensor([x[0, -3] - x[0, 2], y[-3, 0] - y[2, 0]])).unbind(1)
    area, aspect = width * height, width / height
    assert 0.35 <= area.min() < 0.4 and 0.95 < area.max() <= 1 + 1e-5
    assert 0.75 - 1e-5 <= aspect.min() < 0.8 and 1.25 < aspect.max() <= 4 / 3 + 1e-5
    middle = (first + last) / 2
    assert (middle.abs() <= 1 - torch.stack([width, height], 1) + 0.07).all()
    assert cropped.min() >= -1 and cropped.max() <= 1
    assert middle.min() < -0.25 and middle.max() > 0.25


def test_mixup_blends_images_as_it_blends_targets() -> None:
    images, labels = torch.rand(6, 3, 8, 8), torch.tensor([0, 1, 2, 0, 1, 2])
    mixed, targets = mix(images, labels, Draws(0, images=6), classes=4, mixup=1.0, cutmix=0.0)
    weight = targets[0, 0].item()
    assert 0 < weight < 1 and targets[0, 2].item() == pytest.approx(1 - weight)
    torch.testing.assert_close(mixed, weight * images + (1 - weight) * images.flip(0))
    torch.testing.assert_close(targets.sum(1), torch.ones(6))


def test_cutmix_targets_match_the_pasted_area() -> None:
    images = torch.arange(2.0).view(2, 1, 1, 1).expand(2, 3, 16, 8).contiguous()
    seen = set()
    for step in range(50):
        draws = Draws(step, images=2)
        mixed, targets = mix(images, torch.tensor([0, 1]), draws, classes=2, mixup=0.0, cutmix=1.0)
        pasted = mixed[0, 0]  # 1 where pixels come from the other image
        assert pasted.mean().item() == pytest.approx(targets[0, 1].item())
        rows, columns = pasted.any(1).sum(), pasted.any(0).sum()
        assert rows * columns == pasted.sum()
        assert torch.equal(mixed[1], 1 - mixed[0])
        seen.add(int(pasted.sum()))
    assert len(seen) > 10 and not images[0].any()


def test_mixup_and_cutmix_alternate_at_random() -> None:
    images = torch.arange(2.0).view(2, 1, 1, 1).expand(2, 1, 8, 8).contiguous()
    whole = 0
    for step in range(60):
        mixed, _ = mix(images, torch.tensor([0, 1]), Draws(step, images=2), classes=2, mixup=1.0, cutmix=1.0)
        whole += bool(((mixed == 0) | (mixed == 1)).all())
    assert 15 < whole < 45


@pytest.mark.parametrize("world", [2, 3])
@pytest.mark.parametrize("batch", [12, 13])
def test_ranks_together_see_the_batch_of_a_single_process(world: int, batch: int) -> None:
    """Each image gets the same augmentation and the same mixing partner, regardless of the rank that processes it."""
    images, labels = torch.rand(batch, 3, 8, 8), torch.arange(batch) % 5

    def augmented(rows: torch.Tensor | None) -> tuple[torch.Tensor, torch.Tensor]:
        draws = Draws(1, 2, 3, images=batch, rows=rows)
        part = slice(None) if rows is None else rows
        x = random_resized_crop(random_flip_crop(images[part], draws, shift=0.25), draws, scale=0.5)
        x = random_erasing(trivial_augment(x, draws), draws, 0.5)
        return mix(x, labels[part], draws, classes=5, mixup=0.8, cutmix=0.0)

    expected = augmented(None)
    shares = [Ranks(rank, world).share(batch) for rank in range(world)]
    assert sorted(torch.cat(shares).tolist()) == list(range(batch))
    assert min(map(len, shares)) >= Ranks(0, world).least(batch) > 0
    for share in shares:
        for actual, of_all in zip(augmented(share), expected, strict=True):
            torch.testing.assert_close(actual, of_all[share], rtol=0, atol=1e-6)


def picture(size: tuple[int, int] = (24, 16)) -> Image.Image:
    y, x = np.mgrid[: size[0], : size[1]]
    pixels = np.stack([4 * x + 2 * y, 200 - 3 * y, 90 + 40 * np.sin(x / 2)], -1)
    return Image.fromarray(pixels.astype(np.uint8))


# For each operation, Pillow's result for strength 0.5, and the allowed difference on a scale of 0 to 255. Pillow rounds its
# results down. Before it blends the original with a grayscale, uniformly gray or smoothed version, it rounds that version.
PILLOW = {
    "autocontrast": (lambda x, s: ImageOps.autocontrast(x), 1),
    "equalize": (lambda x, s: ImageOps.equalize(x), 0),
    "solarize": (lambda x, s: ImageOps.solarize(x, 128), 0),
    "posterize": (lambda x, s: ImageOps.posterize(x, 5), 0),
    "brightness": (lambda x, s: ImageEnhance.Brightness(x).enhance(1 + 0.495 * s), 1),
    "color": (lambda x, s: ImageEnhance.Color(x).enhance(1 + 0.495 * s), 1.5),
    "contrast": (lambda x, s: ImageEnhance.Contrast(x).enhance(1 + 0.495 * s), 1.5),
    "sharpness": (lambda x, s: ImageEnhance.Sharpness(x).enhance(1 + 0.495 * s), 1.5),
    "rotate": (lambda x, s: x.rotate(s * 67.5, Image.Resampling.BILINEAR), None),
    "translate_x": (lambda x, s: x.transform(x.size, Image.Transform.AFFINE, (1, 0, s * x.width / 4, 0, 1, 0)), 1),
    "translate_y": (lambda x, s: x.transform(x.size, Image.Transform.AFFINE, (1, 0, 0, 0, 1, s * x.height / 4)), 1),
}


@pytest.mark.parametrize("sign", [-1, 1])
@pytest.mark.parametrize("name", PILLOW)
def test_operations_match_pillow(name: str, sign: int) -> None:
    image = picture()
    reference, tolerance = PILLOW[name]
    x = torch.from_numpy(np.array(image)).permute(2, 0, 1)[None].float() / 255
    operation = next(each for each in OPERATIONS if each.__name__ == name)
    actual = operation(x, torch.full((1, 1, 1, 1), 0.5), torch.full((1, 1, 1, 1), float(sign)))
    expected = torch.from_numpy(np.asarray(reference(image, sign)).copy()).permute(2, 0, 1)[None].float()
    difference = (255 * actual - expected).abs()
    if tolerance is None:  # Pillow does not blend the edges of a rotated image with the black background
        assert difference.median() < 3
    else:
        assert difference.max() <= tolerance + 1e-3


@pytest.mark.parametrize("operation", OPERATIONS, ids=lambda each: each.__name__)
def test_strength_controls_the_change(operation: Operation) -> None:
    x = torch.from_numpy(np.array(picture())).permute(2, 0, 1)[None].float() / 255

    def distance(strength: float) -> float:
        return float((operation(x, torch.full((1, 1, 1, 1), strength), torch.ones(1, 1, 1, 1)) - x).abs().mean())

    weak, strong = distance(0.0), distance(0.9)
    if operation.__name__ in ("identity", "autocontrast", "equalize"):  # these ignore the strength
        assert weak == strong
    else:
        assert weak < 1e-5 and strong > 0.001


def test_augmentation_stays_on_the_device_of_the_images() -> None:
    """Use meta tensors in place of GPU tensors. An operation that combines them with CPU tensors raises an error."""
    x, labels = torch.empty(28, 3, 16, 16, device="meta"), torch.zeros(28, dtype=torch.long, device="meta")
    draws, strength = Draws(0, images=28), torch.empty(28, 1, 1, 1, device="meta")
    for operation in OPERATIONS:
        assert operation(x, strength, strength).is_meta
    for changed in (
        trivial_augment(x, draws),
        random_affine(x, draws, degrees=10, scale=0.1, shift=0.1),
        random_resized_crop(x, draws, scale=0.5),
        random_flip_crop(x, draws, shift=0.25),
        random_erasing(x, draws, 0.5),
        mix(x, labels, draws, classes=3, mixup=1.0, cutmix=0.0)[0],
    ):
        assert changed.is_meta and changed.shape == x.shape


def test_every_image_gets_a_separate_operation() -> None:
    x = torch.from_numpy(np.array(picture())).permute(2, 0, 1)[None].float().expand(200, -1, -1, -1) / 255
    changed = trivial_augment(x, Draws(0, images=200))
    assert changed.min() >= 0 and changed.max() <= 1
    assert (
        len({each.numpy().tobytes() for each in changed}) > 120
    )  # some results are equal: of the 14 operations, three have only one outcome each, and posterize has seven
    assert torch.equal(trivial_augment(x, Draws(0, images=200)), changed)
    assert trivial_augment(x[:, :1], Draws(0, images=200)).shape == (200, 1, 24, 16)  # grayscale images also work


@pytest.mark.parametrize(
    "flag, value",
    [("--mixup", "-1"), ("--cutmix", "nan"), ("--crop-scale", "0"), ("--reprob", "1.5"), ("--model-ema-decay", "1")],
)
def test_bad_strengths_are_refused(flag: str, value: str, refused: Callable[..., str]) -> None:
    assert flag in refused(f"{flag}={value}")
