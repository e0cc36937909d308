"""Data as users have it in Python: arrays, data frames, torch and Hugging Face data sets, loaders."""

from __future__ import annotations

import numpy as np
import pandas
import pytest
import torch
from PIL import Image
from torch.utils.data import DataLoader, Dataset, IterableDataset, Subset, TensorDataset

import expunge
from expunge.core.errors import DataError, ModelError, SettingError, SplitError
from expunge.core.modality import made
from expunge.modalities.files import objects, readers

X = torch.arange(24.0).reshape(6, 4) ** 0.5
Y = torch.tensor([0, 1, 2, 0, 1, 2])
WORDS = ["ant", "bee", "cat", "ant", "bee", "cat"]


def read(value, labelled=True, known=None, **options):
    return objects.read(value, options, labelled, known)


class Named(Dataset):
    """A data set of (x, y) as torchvision has them, with `classes`."""

    classes = ("ant", "bee", "cat")

    def __init__(self, jitter=False):
        self.jitter = jitter

    def __len__(self):
        return 6

    def __getitem__(self, i):
        if i >= 6:
            raise IndexError(i)
        return X[i] + (torch.rand(4) if self.jitter else 0), int(Y[i])


class Keyed(Named):
    def __getitem__(self, i):
        x, y = super().__getitem__(i)
        return {"pixel_values": x, "labels": y}


class Stream(IterableDataset):
    def __iter__(self):
        yield from zip(X, Y, strict=True)


def stacked(rows):
    return {"x": torch.stack([r["pixel_values"] for r in rows]), "y": torch.tensor([r["labels"] for r in rows])}


def frame(**more):
    return pandas.DataFrame({"a": X[:, 0].numpy(), "b": X[:, 1].numpy() ** 2, **more})


FORMS = {
    "pair of tensors": lambda: (X, Y),
    "pair of arrays": lambda: (X.numpy(), Y.numpy()),
    "pair of lists": lambda: (X.tolist(), Y.tolist()),
    "doubles": lambda: (X.double().numpy(), Y.numpy().astype(float)),
    "TensorDataset": lambda: TensorDataset(X, Y),
    "Dataset": Named,
    "dictionaries": Keyed,
    "shuffled loader of a Dataset": lambda: DataLoader(Named(), batch_size=2, shuffle=True),
    "loader of dictionaries": lambda: DataLoader(Keyed(), batch_size=4),
    "loader with a collate_fn": lambda: DataLoader(Keyed(), batch_size=4, collate_fn=stacked),
    "list of pairs": lambda: list(zip(X, Y.tolist(), strict=True)),
    "mapping of columns": lambda: {"x": X, "y": Y},
}  # fmt: skip


@pytest.mark.parametrize("form", FORMS, ids=list(FORMS))
def test_every_form_is_the_same_data(form):
    data = read(FORMS[form]())
    assert torch.equal(data.x, X) and torch.equal(data.y, Y) and data.ids.tolist() == list(range(6))
    assert data.x.dtype == torch.float32 and data.schema.shape == (4,)


def test_words_are_classes():
    data = read((X, WORDS))
    assert data.y.tolist() == Y.tolist() and data.schema.classes == ("ant", "bee", "cat")
    assert read((X, np.array(WORDS))).y.tolist() == Y.tolist()
    with pytest.raises(DataError, match="has the class dog"):
        read((X[:1], ["dog"]), known=data.schema)


def test_records_of_a_subset_keep_the_ids_of_what_is_beneath():
    part = Subset(Subset(Named(), [5, 3, 1, 0]), [2, 0])
    data = read(part)
    assert data.ids.tolist() == [1, 5] and data.schema.classes == ("ant", "bee", "cat")


def test_files_of_a_data_set_name_its_records():
    files = Named()
    files.samples = [(f"img/{k}.png", int(Y[k])) for k in range(6)]
    assert read(Subset(files, [4, 2])).names == {4: "img/4.png", 2: "img/2.png"}


def test_data_frames_are_tables():
    data = read((frame(), pandas.Series(WORDS)))
    assert data.schema.columns == ("a", "b") and data.schema.classes == ("ant", "bee", "cat")
    whole = read(frame(kind=WORDS), target="kind")
    assert torch.equal(whole.x, data.x) and torch.equal(whole.y, data.y)
    swapped = read(frame(kind=WORDS)[["kind", "b", "a"]], known=whole.schema)
    assert torch.equal(swapped.x, whole.x)
    with pytest.raises(DataError, match="say which is the target"):
        read(frame(kind=WORDS))
    named = read(frame(kind=WORDS, who=list("uvwxyz")), target="kind", id="who")
    assert named.called(3) == "x"


class Polars:
    """Duck of a polars frame: `columns`, `height`, columns with to_numpy."""

    def __init__(self, columns):
        self.data, self.columns, self.height, self.collect_schema = columns, list(columns), len(columns["a"]), None

    def __getitem__(self, name):
        return self.data[name]

    def to_numpy(self):
        raise NotImplementedError


def test_what_looks_like_polars_is_read_by_columns():
    data = read(Polars({"a": pandas.Series(X[:, 0].numpy()), "label": pandas.Series(WORDS)}))
    assert data.schema.columns == ("a",) and data.y.tolist() == Y.tolist()


def test_hugging_face_data_sets(tmp_path):
    from datasets import ClassLabel, Dataset, DatasetDict, Features, Value
    from datasets import Image as Pictures

    small = [Image.new("RGB", (4, 4), (10 * k, 0, 255)) for k in range(6)]
    features = Features({"image": Pictures(), "label": ClassLabel(names=["ant", "bee", "cat"]), "who": Value("string")})
    hugging = Dataset.from_dict({"image": small, "label": Y.tolist(), "who": list("uvwxyz")}, features=features)
    with pytest.raises(DataError, match="has the column 'who' besides 'image' and 'label'"):
        read(hugging)
    data = read(hugging, id="who")
    assert data.x.shape == (6, 3, 4, 4) and data.schema.classes == ("ant", "bee", "cat") and data.called(5) == "z"
    assert (data.x[:, 0, 0, 0] * 255).round().tolist() == [0, 10, 20, 30, 40, 50]
    assert read(hugging.remove_columns("who")).y.tolist() == Y.tolist()
    assert objects.read(hugging, {"id": "who"}, True, classes=("cat", "bee", "ant")).y.tolist() == [2, 1, 0, 2, 1, 0]
    DatasetDict({"train": hugging}).save_to_disk(tmp_path / "saved")
    again = readers.load("datasets:saved?split=train&id=who", "classification", tmp_path)
    assert torch.equal(again.x, data.x)
    with pytest.raises(DataError, match=r"name the part of saved, as datasets:saved\?split=train"):
        readers.load("datasets:saved", "classification", tmp_path)
    with pytest.raises(DataError, match="streams"):
        read(hugging.to_iterable_dataset())


@pytest.mark.parametrize(
    ("value", "message"),
    [
        (lambda: Stream(), "streaming"),
        (lambda: DataLoader(Stream()), "streams"),
        (lambda: (row for row in X), "streaming"),
        (lambda: Named(jitter=True), "another each time it is read"),
        (lambda: DataLoader(Named(), shuffle=True, collate_fn=lambda b: b), "draws another order each time"),
        (lambda: TensorDataset(X, Y, Y), "has 3 tensors per record"),
        (lambda: ((X * 255).to(torch.uint8), Y), "bytes"),
        (lambda: (X, Y + 0.4), "must hold whole numbers"),
        (lambda: (X, torch.eye(3)[Y]), "one label per record"),
        (lambda: (X, Y[:5]), "6 inputs and 5 targets"),
        (lambda: ([X[0], X[1][:2]], [0, 1]), "no numbers of one shape"),
        (lambda: [(1, 2, 3)] * 4, "must be a pair"),
        (lambda: [], "holds no record"),
        (lambda: {"train": Named(), "q": 1}, "say which is the target"),
    ],
)
def test_what_cannot_be_read_rightly_is_one_line(value, message):
    with pytest.raises(DataError) as found:
        read(value())
    assert message in str(found.value) and "\n" not in str(found.value)


def test_another_scale_is_noticed():
    pixels = torch.rand(6, 1, 4, 4)
    train = read((pixels, Y))
    with pytest.raises(DataError, match="another scale"):
        read((pixels * 255, Y), known=train.schema)


class Answers(torch.nn.Linear):
    """A model that answers in a form of its own."""

    def __init__(self, form):
        torch.manual_seed(0)
        super().__init__(4, 3)
        self.form = form

    def forward(self, x):
        return self.form(super().forward(x))


class Output:
    """As `ModelOutput`: no tensor, with `logits`."""

    def __init__(self, logits):
        self.logits = logits


@pytest.mark.parametrize("form", [lambda y: (y, None), lambda y: {"loss": None, "logits": y}, Output], ids=["tuple", "mapping", "output"])
def test_models_answer_as_they_do(form):
    split = expunge.split((X, Y), "class:1")
    found, plain = (expunge.unlearn("gradient_ascent", Answers(f), "classification", split, epochs=1, lr=0.1) for f in (form, lambda y: y))
    assert found.outcome == plain.outcome and found.patch.digest == plain.patch.digest
    with pytest.raises(ModelError, match="answers with str, in which there are no logits"):
        expunge.unlearn("gradient_ascent", Answers(lambda y: "no"), "classification", split)


def test_tasks_by_name():
    split = expunge.split((X, Y), "class:1")
    with pytest.raises(SettingError, match="did you mean 'classification'"):
        expunge.forget(Answers(lambda y: y), "clasification", split)
    with pytest.raises(SettingError, match="needs more than its name"):
        made("contrastive")


def test_a_users_classifier_to_a_verdict_in_five_lines():
    g = torch.Generator().manual_seed(0)
    centres = torch.tensor([[2.0, 0, 0, 0], [0, 2, 0, 0], [0, 0, 2, 0]])
    y = torch.arange(300) % 3
    x = centres[y] + 0.5 * torch.randn(300, 4, generator=g)
    net = torch.nn.Linear(4, 3)
    with torch.no_grad():
        net.weight.copy_(2 * centres)
        net.bias.zero_()
    words = np.array(["ant", "bee", "cat"])[y.numpy()]
    split = expunge.split((x[:200], words[:200]), "class:bee", test=(x[200:], words[200:]))
    verdict = expunge.forget(net, "classification", split, methods=["gradient_ascent"], slow=False, stop=False)
    assert split.forget.y.unique().tolist() == [1] and split.asked == "class:bee"
    assert verdict.document(pictures=False)["data"]["schema"]["classes"] == ["ant", "bee", "cat"]
    assert verdict.tries
    with pytest.raises(SplitError, match="no class 'dog'"):
        expunge.split((x, words), "class:dog")
