"""Splits, the PyTorch data sets over them, and the sampler."""

import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader

from esl_fast.data import DataError, DataSet, EpochSampler, ImageTensors, PairDataset, Split, load_dataset
from esl_fast.data.images import ImageFiles


def tokenize(captions):
    return torch.tensor([[len(text), text.count("a"), 0] for text in captions])


def to_tensor(image):
    return torch.from_numpy(np.array(image)).permute(2, 0, 1) / 255


def make_split(name="train", captions=(2, 1, 3)):
    images = np.arange(2 * len(captions), dtype=np.float16).reshape(-1, 2)
    texts = [[f"{name} {i} {k}" for k in range(n)] for i, n in enumerate(captions)]
    return Split.from_lists(name, images, texts, [f"{name}{i}" for i in range(len(captions))])


@pytest.fixture(scope="module")
def pictures():
    return load_dataset("synthetic", size=(4, 2, 2)).train


def test_split_subset_and_limit():
    split = make_split()
    assert len(split) == 3
    part = split.subset([2, 0])
    assert part.captions == ["train 2 0", "train 2 1", "train 2 2", "train 0 0", "train 0 1"]
    assert part.owners.tolist() == [0, 0, 0, 1, 1]
    assert part.image_ids == ["train2", "train0"]
    assert part.images[1].tolist() == [0, 1]
    limited = split.limit_captions(2)
    assert limited.captions == ["train 0 0", "train 0 1", "train 1 0", "train 2 0", "train 2 1"]
    assert limited.owners.tolist() == [0, 0, 1, 2, 2]
    with pytest.raises(ValueError, match="at least one"):
        split.limit_captions(0)


@pytest.mark.parametrize("owners", [[0, 0, 2], [1, 0, 2], [0, 1, 3], [0, 1]])
def test_split_rejects_bad_owners(owners):
    with pytest.raises(DataError, match="owners"):
        Split("val", np.zeros((3, 2)), ["a", "b", "c"], owners, ["x", "y", "z"])


def test_splits_may_share_no_image():
    with pytest.raises(DataError, match="in both 'train' and 'train', among them 'train0'"):
        DataSet("x", make_split(), make_split(), make_split("test"), "features", 2)


@pytest.mark.parametrize("cache_bytes", [0, 1 << 30])
def test_pairs_of_pictures(pictures, cache_bytes):
    pairs = PairDataset(pictures, to_tensor, tokenize, cache_bytes=cache_bytes)
    assert len(pairs) == 20
    item = pairs[7]
    torch.testing.assert_close(item["image"], to_tensor(pictures.images[1]))
    assert item["tokens"].dtype == torch.int64
    assert item["tokens"].tolist() == tokenize(pictures.captions)[7].tolist()
    assert (item["image_index"], item["caption_index"]) == (1, 7)
    batch = next(iter(DataLoader(pairs, batch_size=3, collate_fn=pairs.collate)))
    assert batch["image"].shape == (3, 3, 64, 64)
    assert batch["caption_index"].tolist() == [0, 1, 2]


def test_pictures_are_transformed_once_when_cached(pictures):
    calls = []

    def counted(image):
        calls.append(1)
        return to_tensor(image)

    pairs = PairDataset(pictures, counted, tokenize)
    before = len(calls)
    assert all(pairs[j]["image"].shape == (3, 64, 64) for j in range(len(pairs)))
    assert len(calls) == before


def test_pairs_of_features_with_augmentation():
    pairs = PairDataset(make_split(), None, tokenize)
    pairs.augment = lambda item: item | {"image": item["image"] + 1}
    assert pairs[2]["image"].dtype == torch.float32
    assert pairs[2]["image"].tolist() == [3, 4]


def test_each_image_once(pictures):
    images = ImageTensors(pictures.images, to_tensor, cache_bytes=0)
    assert len(images) == 4
    torch.testing.assert_close(images[2], to_tensor(pictures.images[2]))


def test_pictures_need_a_transform(pictures):
    with pytest.raises(ValueError, match="need an image_transform"):
        ImageTensors(pictures.images, None)


def test_data_errors_cross_worker_processes(tmp_path):
    load_dataset("synthetic", size=(1, 1, 1)).train.images[0].save(tmp_path / "good.png")
    (tmp_path / "bad.png").write_bytes(b"no picture")
    images = ImageFiles([tmp_path / "good.png", tmp_path / "bad.png"])
    split = Split.from_lists("train", images, [["a"], ["b"]], ["good.png", "bad.png"])
    pairs = PairDataset(split, to_tensor, tokenize, cache_bytes=0)
    loader = DataLoader(pairs, num_workers=1, collate_fn=pairs.collate)
    with pytest.raises(DataError, match=r"bad\.png: cannot be read as an image"):
        list(loader)


def test_sampler_is_a_function_of_seed_and_epoch():
    order = list(EpochSampler(50, seed=1, epoch=2))
    assert sorted(order) == list(range(50))
    assert list(EpochSampler(50, seed=1, epoch=2)) == order
    assert list(EpochSampler(50, seed=1, epoch=0)) != order
    assert list(EpochSampler(50, seed=2, epoch=1)) != order


def test_sampler_resumes():
    order = list(EpochSampler(50, seed=1, epoch=2))
    sampler = EpochSampler(50, seed=1, epoch=2, start=20)
    assert list(sampler) == order[20:]
    assert len(sampler) == 30
    with pytest.raises(ValueError, match=r"start must be in 0\.\.50, got 51"):
        EpochSampler(50, seed=1, epoch=3, start=51)
