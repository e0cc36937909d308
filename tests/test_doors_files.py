"""Files as users have them: each misreading is a right reading or one line."""

from __future__ import annotations

import gzip
import json

import numpy as np
import pytest
import torch
from PIL import Image

from expunge.core.errors import DataError, ReportError, SplitError
from expunge.modalities.files import readers, schema, selectors, tables
from expunge.parts import seal


def pictures(folder, classes, n=2, mode="RGB", value=None, side=4):
    for k, name in enumerate(classes):
        (folder / name).mkdir(parents=True, exist_ok=True)
        for i in range(n):
            colour = value if value is not None else (10 * k + i if mode == "L" else (10 * k + i, 0, 255))
            Image.new(mode, (side, side), colour).save(folder / name / f"{i}.png")
    return folder


def images(tmp_path, name="im", **options):
    return readers.load(f"images:{name}", "classification", tmp_path, **options)


def table(tmp_path, text, name="a.csv", query="target=label", **options):
    (tmp_path / name).write_bytes(text if isinstance(text, bytes) else text.encode())
    return readers.load(f"csv:{name}?{query}", options.pop("task", "classification"), tmp_path, **options)


ROWS = "".join(f"{(3 * k) % 11}.5,{k * k % 7},{k % 2}\n" for k in range(40))
PLAIN = "u,v,label\n" + ROWS


def test_numbered_folders_keep_natural_order(tmp_path):
    pictures(tmp_path / "im", [str(k) for k in range(12)])
    data = images(tmp_path)
    assert data.schema.classes == tuple(map(str, range(12)))
    forget, _ = selectors.resolve("class:2", data)
    assert [forget.called(i) for i in forget.ids.tolist()] == ["2/0.png", "2/1.png"]
    assert set((forget.x[:, 0, 0, 0] * 255).round().tolist()) == {20.0, 21.0}
    assert images(tmp_path, options={"classes": "sorted"}).schema.classes[2] == "10"


def test_hidden_folders_and_litter_are_no_classes(tmp_path):
    pictures(tmp_path / "im", [".ipynb_checkpoints", "cat", "dog"])
    (tmp_path / "im" / "cat" / ".DS_Store").write_bytes(b"x")
    (tmp_path / "im" / "cat" / "Thumbs.db").write_bytes(b"x")
    (tmp_path / "im" / ".DS_Store").write_bytes(b"x")
    data = images(tmp_path)
    assert data.schema.classes == ("cat", "dog") and len(data) == 4


def test_a_test_folder_that_lacks_a_class_keeps_the_numbers_of_the_others(tmp_path):
    pictures(tmp_path / "im", ["ant", "bee", "cat"])
    pictures(tmp_path / "test", ["ant", "cat"])
    train = images(tmp_path)
    assert images(tmp_path, "test", known=train.schema).y.tolist() == [0, 0, 2, 2]
    pictures(tmp_path / "test", ["dog"])
    with pytest.raises(DataError, match=r"test has the class dog, which the training data lacks: it has 0 ant, 1 bee, 2 cat"):
        images(tmp_path, "test", known=train.schema)


def test_classes_by_name_and_number(tmp_path):
    pictures(tmp_path / "im", ["cat", "dog"])
    data = images(tmp_path)
    by_name, by_number = (selectors.resolve(w, data)[0] for w in ("class:dog", "class:1"))
    assert by_name.ids.tolist() == by_number.ids.tolist() == [2, 3]
    assert selectors.echoed("class:dog", data, by_name) == "class 1 (dog), 2 of 4 records"
    with pytest.raises(SplitError, match=r"no class 'dgo' in the training data; dog is near; it has 0 \(cat\), 1 \(dog\)"):
        selectors.resolve("class:dgo", data)
    pictures(tmp_path / "odd", ["1", "2", "3"])
    odd = images(tmp_path, "odd")
    with pytest.raises(SplitError, match="class:2 is two classes: the one named 2 has number 1, and number 2 is named 3"):
        selectors.resolve("class:2", odd)
    assert selectors.resolve("class:name:2", odd)[0].y.unique().tolist() == [1]
    assert selectors.resolve("class:number:2", odd)[0].y.unique().tolist() == [2]


def test_a_models_own_class_numbers_are_the_numbers(tmp_path):
    pictures(tmp_path / "im", ["cat", "dog"])
    assert images(tmp_path, classes=("dog", "fox", "cat")).y.tolist() == [2, 2, 0, 0]
    with pytest.raises(DataError, match="no class of the model 'cat'"):
        images(tmp_path, classes=("dog", "fox"))


def test_who_numbers_classes():
    words = ["b", "a10", "a9"]
    assert schema.ordered(words) == ("a9", "a10", "b") and schema.ordered(words, how="sorted") == ("a10", "a9", "b")
    assert schema.ordered(words, how="b,a9,a10") == ("b", "a9", "a10")
    assert schema.ordered(words, ("b", "a9", "a10", "c")) == ("b", "a9", "a10", "c")
    assert schema.ordered(words, ("b", "a9", "a10"), "natural") == ("a9", "a10", "b")
    assert schema.ordered(["0", "2"], ("cat", "dog", "fox")) == ("0", "1", "2")
    for how, message in (("b,a9", "classes does not name 'a10'"), ("b,b,a9", "names 'b' twice")):
        with pytest.raises(DataError, match=message):
            schema.ordered(words, how=how)


def test_records_are_named_by_their_files(tmp_path):
    pictures(tmp_path / "im", ["cat", "dog"])
    data = images(tmp_path)
    forget, _ = selectors.resolve("ids:dog/1.png,cat/0.png", data)
    assert forget.ids.tolist() == [0, 3]
    (tmp_path / "gone.txt").write_text("dog/0.png\ncat/1.png\n")
    assert selectors.resolve("ids:@gone.txt", data, tmp_path)[0].ids.tolist() == [1, 2]
    with pytest.raises(SplitError, match=r"1 id\(s\) are not in the training data, the first is dog/7.png \(dog/1.png is\)"):
        selectors.resolve("ids:dog/7.png", data)
    with pytest.raises(DataError, match="leaves the folder"):
        selectors.resolve("ids:@../gone.txt", data, tmp_path / "im", inside=True)


def test_a_root_that_holds_parts_is_no_data(tmp_path):
    pictures(tmp_path / "im" / "train", ["cat"])
    pictures(tmp_path / "im" / "test", ["cat"])
    with pytest.raises(DataError, match="which are parts and no classes; name one of them, as images:im/test"):
        images(tmp_path)
    pictures(tmp_path / "loose", ["cat"])
    Image.new("L", (4, 4)).save(tmp_path / "loose" / "a.png")
    with pytest.raises(DataError, match=r"a.png stands in loose itself"):
        images(tmp_path, "loose")


def saved(tmp_path, array, name="0.png"):
    (tmp_path / "im" / "a").mkdir(parents=True, exist_ok=True)
    Image.fromarray(array).save(tmp_path / "im" / "a" / name)


def test_sixteen_bits_are_read_as_sixteen(tmp_path):
    saved(tmp_path, np.array([[0, 256], [32768, 65535]], np.uint16))
    data = images(tmp_path)
    assert data.x.shape == (1, 1, 2, 2) and data.schema.depth == "16-bit grey"
    assert torch.allclose(data.x.flatten(), torch.tensor([0, 256, 32768, 65535]) / 65535, atol=1e-7)
    saved(tmp_path, np.zeros((2, 2), np.uint8), "1.png")
    with pytest.raises(DataError, match=r"a/1.png is 8-bit grey, the ones before are 16-bit grey"):
        images(tmp_path)


def test_float_tiff_is_read_or_refused(tmp_path):
    saved(tmp_path, np.array([[0.0, 0.25], [0.5, 1.0]], np.float32), "0.tiff")
    assert images(tmp_path).x.flatten().tolist() == [0, 0.25, 0.5, 1]
    saved(tmp_path, np.array([[0.0, 900.0]], np.float32), "0.tiff")
    with pytest.raises(DataError, match="real numbers from 0 to 900"):
        images(tmp_path)


def test_sixteen_bit_colour_is_refused(tmp_path):
    import struct
    import zlib

    def chunk(kind, body):
        return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))

    raw = b"".join(b"\0" + bytes([200, 7] * 6) for _ in range(2))
    head = struct.pack(">IIBBBBB", 2, 2, 16, 2, 0, 0, 0)
    (tmp_path / "im" / "a").mkdir(parents=True)
    (tmp_path / "im" / "a" / "0.png").write_bytes(b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", head) + chunk(b"IDAT", zlib.compress(raw)) + chunk(b"IEND", b""))
    with pytest.raises(DataError, match="16 bits per colour"):
        images(tmp_path)


def test_palettes_are_colours_and_transparency_is_refused(tmp_path):
    (tmp_path / "im" / "a").mkdir(parents=True)
    red = Image.new("RGB", (2, 2), (255, 0, 0))
    red.convert("P").save(tmp_path / "im" / "a" / "0.png")
    assert images(tmp_path).x[0, :, 0, 0].tolist() == [1, 0, 0]
    red.convert("RGBA").save(tmp_path / "im" / "a" / "0.png")
    assert images(tmp_path).x[0, :, 0, 0].tolist() == [1, 0, 0]
    Image.new("RGBA", (2, 2), (255, 0, 0, 9)).save(tmp_path / "im" / "a" / "0.png")
    with pytest.raises(DataError, match="partly transparent"):
        images(tmp_path)
    Image.new("CMYK", (2, 2)).save(tmp_path / "im" / "a" / "0.jpg")
    (tmp_path / "im" / "a" / "0.png").unlink()
    with pytest.raises(DataError, match="mode CMYK"):
        images(tmp_path)


def test_links_stay_in_a_recipes_folder(tmp_path):
    pictures(tmp_path / "in" / "im", ["cat"])
    Image.new("RGB", (4, 4)).save(tmp_path / "away.png")
    (tmp_path / "in" / "im" / "cat" / "2.png").symlink_to(tmp_path / "away.png")
    assert len(images(tmp_path / "in")) == 3
    with pytest.raises(DataError, match=r"cat/2.png is a link that leaves"):
        images(tmp_path / "in", inside=True)


def test_columns_are_known_by_name(tmp_path):
    train = table(tmp_path, PLAIN)
    swapped = table(tmp_path, "label,v,u\n0,1,2.5\n1,3,4.5\n", "b.csv", known=train.schema)
    assert swapped.x.tolist() == [[2.5, 1], [4.5, 3]] and swapped.y.tolist() == [0, 1]
    with pytest.raises(DataError, match=r"c.csv lacks the column 'v'"):
        table(tmp_path, "u,label\n1,0\n2,1\n", "c.csv", known=train.schema)
    more = "u,w,v,label\n1,9,2,0\n2,9,3,1\n"
    with pytest.raises(DataError, match=r"the column 'w', which the training data lacks; --ignore w leaves it out"):
        table(tmp_path, more, "d.csv", known=train.schema)
    assert table(tmp_path, more, "d.csv", known=train.schema, options={"ignore": "w"}).x.tolist() == [[1, 2], [2, 3]]
    with pytest.raises(DataError, match=r"two columns named 'u'"):
        table(tmp_path, "u,u,label\n1,2,0\n3,4,1\n", "e.csv")


def test_an_id_column_names_records_and_is_no_feature(tmp_path):
    text = "id,u,label\n" + "".join(f"{100 + 7 * k},{k % 5},{(k // 5) % 2}\n" for k in range(30))
    with pytest.raises(DataError, match=r"column 'id' of a.csv numbers the records and is no input: --id-column id"):
        table(tmp_path, text)
    data = table(tmp_path, text, options={"id": "id"})
    assert data.x.shape == (30, 1) and data.ids[:2].tolist() == [100, 107]
    assert selectors.resolve("ids:107,114", data)[0].ids.tolist() == [107, 114]
    counted = "row,u,label\n" + "".join(f"{k},{k % 5},{(k // 5) % 2}\n" for k in range(30))
    with pytest.raises(DataError, match=r"column 'row' of b.csv numbers the records"):
        table(tmp_path, counted, "b.csv")
    words = "who,u,label\n" + "".join(f"person-{k},{k % 5},{(k // 5) % 2}\n" for k in range(30))
    named = table(tmp_path, words, "c.csv", options={"id": "who"})
    forget, _ = selectors.resolve("ids:person-3", named)
    assert forget.ids.tolist() == [3] and selectors.echoed("ids:person-3", named, forget) == "1 of 30 records: person-3"
    with pytest.raises(SplitError, match="the first is 3"):
        selectors.resolve("ids:3", named)
    with pytest.raises(DataError, match="names person-1 twice, again in row 2"):
        table(tmp_path, "who,u,label\nperson-0,1,0\nperson-1,2,1\nperson-1,3,0\n", "d.csv", options={"id": "who"})


def test_a_column_that_holds_the_target_is_a_leak(tmp_path):
    with pytest.raises(DataError, match=r"column 'copy' of a.csv holds the target 'label' \(a leak\)"):
        table(tmp_path, "u,copy,label\n" + "".join(f"{k * k % 7},{k % 2},{k % 2}\n" for k in range(8)))
    with pytest.raises(DataError, match=r"column 'code' of a.csv holds the target"):
        table(tmp_path, "u,code,label\n" + "".join(f"{k * k % 7},{50 - 3 * (k % 3)},{k % 3}\n" for k in range(40)))
    with pytest.raises(DataError, match=r"column 'price2' of a.csv holds the target"):
        table(tmp_path, "u,price2,label\n1,2.5,2.5\n3,4.5,4.5\n", task="regression")


def test_labels_are_whole_numbers_or_words(tmp_path):
    with pytest.raises(DataError, match=r"must hold whole numbers for classification; row 1 has 1.4"):
        table(tmp_path, "u,label\n1,1\n2,1.4\n")
    data = table(tmp_path, "u,label\n1,dog\n2,cat\n3,dog\n")
    assert data.schema.classes == ("cat", "dog") and data.y.tolist() == [1, 0, 1]
    assert table(tmp_path, "u,label\n1,dog\n", "b.csv", known=data.schema).y.tolist() == [1]
    with pytest.raises(DataError, match="has the class fox, which the training data lacks"):
        table(tmp_path, "u,label\n1,fox\n", "b.csv", known=data.schema)
    with pytest.raises(DataError, match="holds numbers, that of the training data names: 0 cat, 1 dog"):
        table(tmp_path, "u,label\n1,1\n", "b.csv", known=data.schema)
    with pytest.raises(DataError, match=r"has the class 7, which the training data lacks"):
        table(tmp_path, "u,v,label\n1,2,7\n", "b.csv", known=table(tmp_path, PLAIN).schema)


def test_file_names_are_names_and_no_patterns(tmp_path):
    table(tmp_path, PLAIN, "a1.csv")
    assert len(table(tmp_path, "u,v,label\n1.5,5,0\n2.5,6,1\n", "a[1].csv")) == 2
    assert len(table(tmp_path, "u,v,label\n1.5,5,0\n2.5,6,1\n", "a*.csv")) == 2


def test_packed_tables_have_a_limit(tmp_path, monkeypatch):
    assert len(table(tmp_path, gzip.compress(PLAIN.encode()), "a.csv.gz")) == 40
    monkeypatch.setattr(tables, "MAX_UNPACKED", 1000)
    bomb = gzip.compress(PLAIN.encode() + b"1.5,2,0\n" * 100_000)
    with pytest.raises(DataError, match="unpacks to more than 1000 bytes"):
        table(tmp_path, bomb, "b.csv")
    with pytest.raises(DataError, match="no whole gzip"):
        table(tmp_path, gzip.compress(PLAIN.encode())[:-9], "c.csv")
    with pytest.raises(DataError, match="packed with bzip2"):
        table(tmp_path, b"BZh91AY", "d.csv")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("u,v,label\n1,,0\n2,3,1\n", "column 'v' of a.csv is empty in row 0"),
        ("u;label\n1;0\n", "no target column 'label'"),
        ("u,label\n1e300,0\n2,1\n", "beyond float32 in row 0"),
        ("u,label\n2020-01-02,0\n2020-01-03,1\n", "column 'u' of a.csv is not numeric"),
        ("", "cannot be read as csv"),
        (b"\xff\xfe\x00", "a.csv"),
        (b"u,\xb2,label\n1,2,0\n2,3,1\n", "a.csv has column names that are not in UTF-8"),
    ],
)
def test_bad_tables_are_one_line(tmp_path, text, message):
    with pytest.raises(DataError) as found:
        table(tmp_path, text)
    assert message in str(found.value) and "\n" not in str(found.value)


def test_a_schema_is_kept_and_read_back(tmp_path):
    train = table(tmp_path, PLAIN.replace("label", "kind"), query="target=kind")
    document = {"identity": {}, "data": {"schema": train.schema.record()}}
    (tmp_path / "report.json").write_text(json.dumps({**document, **seal.seal(document)}))
    again = schema.read(tmp_path / "report.json")
    (tmp_path / "changed.json").write_text(json.dumps({**document, **seal.seal(document), "title": "other"}))
    with pytest.raises(ReportError, match="was changed after it was written"):
        schema.read(tmp_path / "changed.json")
    assert again == train.schema
    other = table(tmp_path, "kind,v,u\n0,1,2.5\n1,3,4.5\n", "b.csv", query="", known=again)
    assert other.x.tolist() == [[2.5, 1], [4.5, 3]]
    (tmp_path / "bad.json").write_text('{"kind": "table", "shape": ["x"]}')
    with pytest.raises(DataError, match=r"schema in bad.json is damaged"):
        schema.read(tmp_path / "bad.json")
