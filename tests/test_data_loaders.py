"""The loaders of data sets on disk: layouts, cleaning of captions, and one clear error for each thing that is wrong."""

import json
import pickle

import numpy as np
import pytest
from PIL import Image

from esl_fast.data import DataError, load_dataset
from esl_fast.data.images import ImageFiles, MappedArray


def save_jpeg(path, shade=100):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (12, 8), (shade, 20, 30)).save(path)


def write_json(path, images):
    path.write_text(json.dumps({"images": images}), encoding="utf-8")
    return path


def entry(name, split, captions=5, **more):
    sentences = [{"raw": f"{name} says {k} ."} for k in range(captions)]
    return {"filename": name, "split": split, "sentences": sentences} | more


def make_karpathy(root, entries=None, folder="images", file="dataset_x.json"):
    splits = ["train"] * 4 + ["restval", "val", "val", "test", "test"]
    entries = entries or [entry(f"{i}.jpg", split) for i, split in enumerate(splits)]
    for item in entries:
        save_jpeg(root / folder / item.get("filepath", "") / item["filename"])
    write_json(root / file, entries)
    return entries


def make_coco_files(root):
    names = {"train": ("COCO_train2014_1.jpg", "COCO_val2014_2.jpg"), "dev": ("COCO_val2014_3.jpg",)}
    names["testall"] = ("COCO_val2014_4.jpg", "odd.jpg")
    for prefix, files in names.items():
        images = []
        for number, name in enumerate(files):
            save_jpeg(root / ("train2014" if "train" in name else "val2014") / name)
            images.append({"file_name": name, "sentences": [{"raw": f" A Dog {k}. \n"} for k in range(5 + number * 2)]})
        write_json(root / f"{prefix}_coco.json", images)


def make_regions(root, counts=None, repeat=1, dim=3):
    for prefix, n in (counts or {"train": 4, "dev": 2, "test": 2}).items():
        array = np.arange(n * 2 * dim).reshape(n, 2, dim).astype(np.float16)
        np.save(root / f"{prefix}_ims.npy", array.repeat(repeat, axis=0))
        (root / f"{prefix}_caps.txt").write_text("".join(f"{prefix} Caption {j}\n" for j in range(5 * n)))


def edit(path, change):
    content = json.loads(path.read_text())
    change(content["images"])
    path.write_text(json.dumps(content))


def test_karpathy_layout(tmp_path):
    make_karpathy(tmp_path)
    data = load_dataset("karpathy", tmp_path)
    assert [len(split) for split in (data.train, data.val, data.test)] == [5, 2, 2]
    assert data.train.image_ids[-1] == "4.jpg"
    assert data.train.captions[:2] == ["0.jpg says 0 .", "0.jpg says 1 ."]
    assert data.train.owners.dtype == np.int64
    assert (data.train.owners == np.repeat(np.arange(5), 5)).all()
    assert data.image_kind == "pixels"
    assert data.test.images[1].mode == "RGB"


@pytest.mark.parametrize("folder", ["flickr30k-images", "flickr30k_images", "images", ""])
def test_flickr30k_layout_and_captions(tmp_path, folder):
    entries = make_karpathy(tmp_path, folder=folder, file="dataset_flickr30k.json")
    raws = ["Two Dogs .", "..A man.", "Mr. X runs...", " plain \n"]
    edit(tmp_path / "dataset_flickr30k.json", lambda images: images[-1].update(sentences=[{"raw": r} for r in raws]))
    data = load_dataset("flickr30k", tmp_path)
    assert data.test.captions[-4:] == ["two dogs", "a man", "mr. x runs", "plain"]
    assert len(data.train) + len(data.val) + len(data.test) == len(entries)


def test_explicit_paths(tmp_path):
    make_karpathy(tmp_path, folder="elsewhere", file="notes.json")
    data = load_dataset("karpathy", annotations=tmp_path / "notes.json", image_root=tmp_path / "elsewhere")
    assert data.val.images[0].size == (12, 8)


def test_coco_three_files(tmp_path):
    make_coco_files(tmp_path)
    data = load_dataset("coco", tmp_path)
    assert data.train.image_ids == ["COCO_train2014_1.jpg", "COCO_val2014_2.jpg"]
    assert data.train.captions[0] == "a dog 0."
    assert [p.parent.name for p in data.test.images.paths] == ["val2014", "val2014"]
    assert len(data.test.captions) == 12
    limited = data.test.limit_captions(5)
    assert limited.owners.tolist() == [0] * 5 + [1] * 5
    assert limited.captions == data.test.captions[:10]


def test_coco_karpathy_file(tmp_path):
    make_karpathy(
        tmp_path,
        [
            entry("COCO_train2014_1.jpg", "train", filepath="train2014"),
            entry("COCO_val2014_2.jpg", "restval", 6, filepath="val2014"),
            entry("COCO_val2014_3.jpg", "val", filepath="val2014"),
            entry("COCO_val2014_4.jpg", "test", 7, filepath="val2014"),
        ],
        folder="pictures",
        file="dataset_coco.json",
    )
    data = load_dataset("coco", tmp_path, image_root=tmp_path / "pictures")
    assert data.train.image_ids == ["train2014/COCO_train2014_1.jpg", "val2014/COCO_val2014_2.jpg"]
    assert len(data.train.captions) == 11
    assert len(data.test.captions) == 7


def test_features(tmp_path):
    make_karpathy(tmp_path)
    array = np.arange(18, dtype=np.float16).reshape(9, 2)
    np.save(tmp_path / "x.npy", array)
    data = load_dataset("features", tmp_path)
    assert (data.image_kind, data.feature_dim) == ("features", 2)
    np.testing.assert_array_equal(data.val.images[1], array[6])
    assert data.val.images[1].dtype == np.float16


@pytest.mark.parametrize("repeat", [1, 5])
def test_regions(tmp_path, repeat):
    make_regions(tmp_path, repeat=repeat)
    data = load_dataset("regions", tmp_path)
    assert (data.image_kind, data.feature_dim, len(data.train)) == ("regions", 3, 4)
    np.testing.assert_array_equal(data.train.images[2], np.arange(12, 18).reshape(2, 3))
    assert data.train.captions[10] == "train caption 10"
    assert data.train.owners[10] == 2


def test_regions_prefer_testall_and_take_ids(tmp_path):
    make_regions(tmp_path, {"train": 4, "dev": 2, "test": 1, "testall": 3})
    (tmp_path / "testall_ids.txt").write_text("a.jpg\nb.jpg\nc.jpg\n")
    assert load_dataset("regions", tmp_path).test.image_ids == ["a.jpg", "b.jpg", "c.jpg"]


def test_missing_val_is_set_aside_from_train_never_from_test(tmp_path):
    make_karpathy(tmp_path, [entry(f"{i}.jpg", "test" if i > 19 else "train") for i in range(25)])
    with pytest.warns(UserWarning, match="no val split: 2 of the 20 train images"):
        data = load_dataset("karpathy", tmp_path, seed=1)
    assert [len(split) for split in (data.train, data.val, data.test)] == [18, 2, 5]
    with pytest.warns(UserWarning, match="no val split"):
        again = load_dataset("karpathy", tmp_path, seed=1)
    assert again.val.image_ids == data.val.image_ids
    assert not set(data.val.image_ids) & set(data.train.image_ids)


def test_regions_without_dev(tmp_path):
    make_regions(tmp_path, {"train": 20, "test": 2})
    with pytest.warns(UserWarning, match="no val split"):
        data = load_dataset("regions", tmp_path)
    assert (len(data.train), len(data.val)) == (18, 2)


def test_regions_without_captions(tmp_path):
    make_regions(tmp_path)
    (tmp_path / "test_caps.txt").write_text("")
    with pytest.raises(DataError, match=r"test_caps.txt: holds 0 captions"):
        load_dataset("regions", tmp_path)


@pytest.mark.parametrize("only", ["train", "val", "test"])
@pytest.mark.parametrize("name", ["karpathy", "flickr30k", "coco", "features"])
def test_only_the_split_asked_for_need_be_there(tmp_path, name, only):
    file, folder = f"dataset_{name}.json", "train2014" if name == "coco" else "images"
    entries = [entry(f"{i}.jpg", split) for i, split in enumerate(["train", "train", "val", "test", "test"])]
    make_karpathy(tmp_path, entries, folder, file)
    np.save(tmp_path / "x.npy", np.arange(10, dtype=np.float32).reshape(5, 2))
    whole = getattr(load_dataset(name, tmp_path), only)
    for item in entries:
        if item["split"] != only:
            (tmp_path / folder / item["filename"]).unlink()
    # With entries of other splits, whose images are missing, and without (train without val would be cut in two).
    for kept in (entries, [item for item in entries if item["split"] in (only, "val")]):
        if name != "features":
            write_json(tmp_path / file, kept)
        data = load_dataset(name, tmp_path, only=only)
        split = getattr(data, only)
        assert (split.image_ids, split.captions) == (whole.image_ids, whole.captions)
        np.testing.assert_array_equal(split.images[0], whole.images[0])
        assert [getattr(data, other) for other in {"train", "val", "test"} - {only}] == [None, None]


@pytest.mark.parametrize(("only", "files"), [("train", ["train", "dev"]), ("val", ["dev"]), ("test", ["testall"])])
@pytest.mark.parametrize("layout", ["coco", "regions"])
def test_only_the_files_of_one_split(tmp_path, layout, only, files):
    if layout == "regions":
        make_regions(tmp_path, dict.fromkeys(files, 3))
    else:
        make_coco_files(tmp_path)
        for other in {"train", "dev", "testall"} - set(files):
            (tmp_path / f"{other}_coco.json").unlink()
    data = load_dataset(layout, tmp_path, only=only)
    assert len(getattr(data, only)) >= 1
    assert [getattr(data, other) for other in {"train", "val", "test"} - {only}] == [None, None]
    if (layout, only) == ("regions", "train"):
        with pytest.warns(UserWarning, match="no test split"):
            load_dataset(layout, tmp_path)
    else:
        with pytest.raises(DataError, match=r"train_ims.npy|expected dataset_coco.json"):
            load_dataset(layout, tmp_path)


def test_a_val_set_aside_is_the_same_alone(tmp_path):
    make_karpathy(tmp_path, [entry(f"{i}.jpg", "test" if i > 19 else "train") for i in range(25)])
    with pytest.warns(UserWarning, match="no val split"):
        whole = load_dataset("karpathy", tmp_path)
    for only in ("train", "val"):
        with pytest.warns(UserWarning, match="no val split"):
            data = load_dataset("karpathy", tmp_path, only=only)
        assert getattr(data, only).image_ids == getattr(whole, only).image_ids
    assert load_dataset("karpathy", tmp_path, only="test").test.image_ids == whole.test.image_ids


@pytest.mark.parametrize(
    ("only", "there", "missing"), [(None, "test", "train"), ("test", "train", "test"), ("train", "test", "train"),
    ("train", "val", "train"), ("val", "test", "train")],
)  # fmt: skip
def test_a_split_that_is_needed_is_named(tmp_path, only, there, missing):
    make_karpathy(tmp_path, [entry(f"{i}.jpg", there) for i in range(4)])
    with pytest.raises(DataError, match=f"no usable image in its {missing} split"):
        load_dataset("karpathy", tmp_path, only=only)


@pytest.mark.filterwarnings("ignore:.*no val split")
def test_training_can_do_without_test(tmp_path):
    make_karpathy(tmp_path, [entry(f"{i}.jpg", "train") for i in range(20)])
    with pytest.warns(UserWarning, match="no test split"):
        assert load_dataset("karpathy", tmp_path).test is None
    make_regions(tmp_path)
    for file in tmp_path.glob("test_*"):
        file.unlink()
    with pytest.warns(UserWarning, match="no test split"):
        assert load_dataset("regions", tmp_path).test is None


def test_a_test_split_that_cannot_be_used_is_not_done_without(tmp_path):
    make_karpathy(tmp_path, [entry(f"{i}.jpg", ("train", "val", "test")[i % 3]) for i in range(9)])
    for i in (2, 5, 8):
        next(tmp_path.rglob(f"{i}.jpg")).unlink()
    with pytest.raises(DataError, match="no usable image in its test split: 3 records or captions were skipped"):
        load_dataset("karpathy", tmp_path, on_error="skip")


def drop(key):
    return lambda images: images[1].pop(key)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (drop("filename"), r'dataset_x.json: record 1: the key "filename" is missing'),
        (drop("split"), r'record 1 \(\'1.jpg\'\): the key "split" is missing'),
        (drop("sentences"), r'record 1 .*"sentences" is missing'),
        (lambda images: images[1].update(split="dev"), r"record 1 .*split 'dev' is not one of train, restval"),
        (lambda images: images[1].update(sentences=[]), r"record 1 .*has no captions"),
        (lambda images: images[1].update(sentences="x"), r'record 1 .*"sentences" must be a list, found str'),
        (lambda images: images[1]["sentences"][2].pop("raw"), r'record 1 .*sentence 2: the key "raw" is missing'),
        (lambda images: images[1]["sentences"][2].update(raw=" "), r"record 1 .*sentence 2: the caption is empty"),
        (lambda images: images[1].update(filename="no.jpg"), r"record 1 \('no.jpg'\): no image file .*no.jpg"),
        (lambda images: images[1].update(filename="7.jpg"), r"record 7 .*already record 1"),
        (lambda images: images.__setitem__(1, 5), r"record 1: expected an object, found int"),
    ],
)
def test_bad_record(tmp_path, change, message):
    make_karpathy(tmp_path)
    edit(tmp_path / "dataset_x.json", change)
    with pytest.raises(DataError, match=message):
        load_dataset("karpathy", tmp_path)
    with pytest.warns(UserWarning, match="1 records or captions were skipped, the first because of: .*record"):
        data = load_dataset("karpathy", tmp_path, on_error="skip")
    assert data.skipped == 1


def test_json_errors(tmp_path):
    make_karpathy(tmp_path)
    path = tmp_path / "dataset_x.json"
    path.write_text('{"images":\n [1, ]}')
    with pytest.raises(DataError, match=r"dataset_x.json: not valid JSON at line 2, column"):
        load_dataset("karpathy", tmp_path, on_error="skip")
    path.write_text("[]")
    with pytest.raises(DataError, match=r'dataset_x.json: expected an object with a list "images"'):
        load_dataset("karpathy", tmp_path)
    path.write_bytes(b"\xff\xfe\xfa")
    with pytest.raises(DataError, match="not UTF-8"):
        load_dataset("karpathy", tmp_path)
    path.unlink()
    with pytest.raises(DataError, match=r"expected exactly one dataset\*.json, found none; .*annotations="):
        load_dataset("karpathy", tmp_path)
    with pytest.raises(DataError, match=r"nothing.json: no such file"):
        load_dataset("karpathy", tmp_path, annotations=tmp_path / "nothing.json")


def test_missing_folders(tmp_path):
    make_karpathy(tmp_path, folder="elsewhere")
    with pytest.raises(DataError, match=r"none of its images was found in .*image_root="):
        load_dataset("karpathy", tmp_path)
    with pytest.raises(DataError, match=r"no such folder \(given as image_root=\)"):
        load_dataset("karpathy", tmp_path, image_root=tmp_path / "nowhere")
    with pytest.raises(DataError, match=r"no such folder \(given as root=\)"):
        load_dataset("coco", tmp_path / "nowhere")
    with pytest.raises(DataError, match=r"say where with root="):
        load_dataset("regions")
    with pytest.raises(DataError, match=r"expected dataset_coco.json, or train_coco.json"):
        load_dataset("coco", tmp_path)


def test_coco_missing_image(tmp_path):
    make_coco_files(tmp_path)
    (tmp_path / "val2014" / "odd.jpg").unlink()
    with pytest.raises(DataError, match=r"testall_coco.json: record 1 \('odd.jpg'\): no such image file in .*val2014"):
        load_dataset("coco", tmp_path)


def test_same_image_in_two_files(tmp_path):
    make_coco_files(tmp_path)
    (tmp_path / "dev_coco.json").write_text((tmp_path / "testall_coco.json").read_text())
    with pytest.raises(DataError, match=r"2 images are in both 'val' and 'test', among them 'COCO_val2014_4.jpg'"):
        load_dataset("coco", tmp_path)


def test_damaged_images_are_met_when_read_or_skipped_at_load(tmp_path):
    make_karpathy(tmp_path)
    whole = (tmp_path / "images" / "1.jpg").read_bytes()
    (tmp_path / "images" / "1.jpg").write_bytes(whole[: len(whole) - 60])
    (tmp_path / "images" / "2.jpg").write_bytes(b"")
    data = load_dataset("karpathy", tmp_path)
    for index in (1, 2):
        with pytest.raises(DataError, match=rf"{index}.jpg: cannot be read as an image"):
            data.train.images[index]
    with pytest.warns(UserWarning, match="2 records or captions were skipped"):
        data = load_dataset("karpathy", tmp_path, on_error="skip")
    assert data.train.image_ids == ["0.jpg", "3.jpg", "4.jpg"]
    assert data.skipped == 2
    assert data.train.captions[5] == "3.jpg says 0 ."


@pytest.mark.parametrize(
    ("image", "expected"),
    [
        (Image.fromarray(np.full((4, 6), 32768, dtype=np.uint16)), (128, 128, 128)),
        (Image.new("L", (6, 4), 90), (90, 90, 90)),
        (Image.new("RGBA", (6, 4), (1, 2, 3, 0)), (1, 2, 3)),
        (Image.new("P", (6, 4), 0), (0, 0, 0)),
        (Image.new("1", (6, 4), 1), (255, 255, 255)),
    ],
)
def test_pixel_modes_become_rgb(tmp_path, image, expected):
    image.save(tmp_path / "x.png")
    decoded = ImageFiles([tmp_path / "x.png"])[0]
    assert (decoded.mode, decoded.size, decoded.getpixel((0, 0))) == ("RGB", (6, 4), expected)


def test_32_bits_of_8(tmp_path):
    for value, expected in ((130, 130), (130 << 8, 130)):
        Image.fromarray(np.full((4, 6), value, dtype=np.int32)).save(tmp_path / "x.tif")
        assert ImageFiles([tmp_path / "x.tif"])[0].getpixel((0, 0)) == (expected,) * 3


def test_cmyk_and_exif_orientation(tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.new("CMYK", (6, 4)).save(tmp_path / "x.jpg", exif=exif)
    decoded = ImageFiles([tmp_path / "x.jpg"])[0]
    assert (decoded.mode, decoded.size) == ("RGB", (6, 4))


def features_of(tmp_path, array):
    make_karpathy(tmp_path)
    np.save(tmp_path / "x.npy", array)
    return tmp_path


@pytest.mark.parametrize(
    ("array", "message"),
    [
        (np.zeros((8, 2), np.float32), r"x.npy: 8 rows, but .*dataset_x.json has 9 images"),
        (np.zeros((9, 2, 2), np.float32), r"x.npy: expected 2 axes .*found shape \(9, 2, 2\)"),
        (np.zeros((9, 2), np.int64), r"x.npy: expected floating-point numbers, found int64"),
        (np.array([[None]]), r"x.npy: cannot be read as a .npy array"),
    ],
)
def test_bad_feature_array(tmp_path, array, message):
    with pytest.raises(DataError, match=message):
        load_dataset("features", features_of(tmp_path, array))


def test_feature_file_errors(tmp_path):
    root = features_of(tmp_path, np.zeros((9, 2), np.float32))
    with pytest.raises(DataError, match=r"no.npy: no such file"):
        load_dataset("features", root, features=root / "no.npy")
    content = (root / "x.npy").read_bytes()
    (root / "x.npy").write_bytes(content[:-5])
    with pytest.raises(DataError, match=r"x.npy: cannot be read"):
        load_dataset("features", root)
    np.savez(root / "y.npz", a=np.zeros(2))
    with pytest.raises(DataError, match=r"y.npz: expected a .npy file with one array"):
        load_dataset("features", root, features=root / "y.npz")
    (root / "x.npy").unlink()
    with pytest.raises(DataError, match=r"expected exactly one \*.npy, found none"):
        load_dataset("features", root)


def test_non_finite_features(tmp_path):
    array = np.zeros((9, 2), np.float32)
    array[3, 1] = np.nan
    data = load_dataset("features", features_of(tmp_path, array))
    with pytest.raises(DataError, match=r"no number at all"):
        load_dataset("features", features_of(tmp_path, array[:, :0]))
    data = load_dataset("features", features_of(tmp_path, np.where(np.isnan(array), 1e300, array.astype(np.float64))))
    with pytest.raises(DataError, match=r"x.npy: row 3 .* float32 cannot hold"):
        data.train.images[3]
    data = load_dataset("features", features_of(tmp_path, array))
    with pytest.raises(DataError, match=r"x.npy: row 3 holds NaN or infinite"):
        data.train.images[3]
    with pytest.warns(UserWarning, match="x.npy: row 3"):
        data = load_dataset("features", tmp_path, on_error="skip")
    assert (data.skipped, data.train.image_ids) == (1, ["0.jpg", "1.jpg", "2.jpg", "4.jpg"])


def test_region_errors(tmp_path):
    make_regions(tmp_path)
    captions = tmp_path / "dev_caps.txt"
    lines = captions.read_text()
    captions.write_text(lines + "one more\n")
    with pytest.raises(DataError, match=r"dev_ims.npy: 2 rows do not fit the 11 captions of .*dev_caps.txt"):
        load_dataset("regions", tmp_path)
    captions.write_text(lines.replace("dev Caption 3\n", "\n"))
    with pytest.raises(DataError, match=r"dev_caps.txt: line 4: the caption is empty"):
        load_dataset("regions", tmp_path)
    with pytest.warns(UserWarning, match="line 4"):
        assert len(load_dataset("regions", tmp_path, on_error="skip").val.captions) == 9
    captions.write_text(lines.replace("dev Caption 9\n", "\n"))
    with pytest.raises(DataError, match=r"dev_caps.txt: line 10: the caption is empty"):
        load_dataset("regions", tmp_path)
    captions.write_text("\ufeff" + lines + "\n \n")
    assert load_dataset("regions", tmp_path).val.captions[0] == "dev caption 0"
    captions.write_text((tmp_path / "test_caps.txt").read_text())
    with pytest.raises(DataError, match=r"dev_caps.txt and test_caps.txt are the same"):
        load_dataset("regions", tmp_path)
    captions.write_text(lines)
    (tmp_path / "dev_ids.txt").write_text("a\na\n")
    with pytest.raises(DataError, match=r"dev_ids.txt: expected 2 different lines"):
        load_dataset("regions", tmp_path)
    (tmp_path / "dev_ids.txt").unlink()
    np.save(tmp_path / "dev_ims.npy", np.random.RandomState(0).rand(10, 2, 3))
    with pytest.raises(DataError, match=r"dev_ims.npy: as many rows as .* the first 5 rows differ"):
        load_dataset("regions", tmp_path)
    np.save(tmp_path / "dev_ims.npy", np.zeros((2, 2, 4)))
    with pytest.raises(DataError, match=r"the feature sizes of the splits differ"):
        load_dataset("regions", tmp_path)
    (tmp_path / "test_ims.npy").unlink()
    with pytest.raises(DataError, match=r"test_ims.npy: no such file"):
        load_dataset("regions", tmp_path, only="test")


def test_mapped_arrays_are_pickled_by_path(tmp_path):
    np.save(tmp_path / "x.npy", np.ones((100, 50), np.float32))
    array = MappedArray(tmp_path / "x.npy", ndim=2)
    content = pickle.dumps(array)
    assert len(content) < 1000
    assert pickle.loads(content)[7].sum() == 50


def test_arguments(tmp_path):
    with pytest.raises(DataError, match="unknown data set 'imagenet'; known are synthetic, flickr30k"):
        load_dataset("imagenet")
    with pytest.raises(DataError, match="on_error must be 'raise' or 'skip', got 'ignore'"):
        load_dataset("coco", tmp_path, on_error="ignore")
    with pytest.raises(DataError, match="only must be None or one of train, val, test, got 'dev'"):
        load_dataset("coco", tmp_path, only="dev")
    with pytest.raises(DataError, match="root= is given, but data set 'synthetic' takes none"):
        load_dataset("synthetic", tmp_path)
