"""The patch: exact inverse, round trip on disk, and refusal of everything damaged or foreign."""

from __future__ import annotations

import copy
import errno
import os
import subprocess
import sys
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from expunge.core.edits import Hook, LowRank, Replace, bits
from expunge.core.errors import PatchError
from expunge.core.files import write
from expunge.core.patch import Patch, difference


class Holder(nn.Module):
    """Parameters w (6, 4) of a given type and a 0-dim scale; integer and boolean buffers."""

    def __init__(self, dtype: torch.dtype = torch.float32, seed: int = 0) -> None:
        super().__init__()
        g = torch.Generator().manual_seed(seed)
        self.w = nn.Parameter(torch.randn(6, 4, generator=g).to(dtype))
        self.scale = nn.Parameter(torch.tensor(1.5, dtype=dtype))
        self.register_buffer("steps", torch.tensor(3))
        self.register_buffer("flags", torch.tensor([True, False, True]))


def raw(model: nn.Module) -> dict[str, torch.Tensor]:
    return {n: bits(t).clone() for n, t in (*model.named_parameters(), *model.named_buffers())}


def same(a: nn.Module, b: nn.Module) -> bool:
    x, y = raw(a), raw(b)
    return all(torch.equal(x[n], y[n]) for n in x)


def checker(shape: tuple[int, ...], every: int = 2) -> torch.Tensor:
    return (torch.arange(torch.Size(shape).numel()) % every == 0).view(shape)


def sample(model: Holder) -> Patch:
    """Half of w (holding -0.0, inf, nan), the 0-dim scale, the integer and the boolean buffer."""
    mask = checker((6, 4))
    values = torch.linspace(-1, 1, 12).to(model.w.dtype)
    values[0], values[1], values[2] = -0.0, torch.inf, torch.nan
    edits = (
        Replace("w", values, mask), Replace("scale", torch.tensor(-2.5, dtype=model.scale.dtype)),
        Replace("steps", torch.tensor(9)), Replace("flags", torch.tensor([False, False, True])),
    )  # fmt: skip
    return Patch(edits).stamped(model, method="by_hand")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
def test_inverse_restores_every_bit(dtype):
    model = Holder(dtype)
    with torch.no_grad():
        model.w.view(-1)[0] = -0.0
        model.w.view(-1)[2] = torch.nan
    original = copy.deepcopy(model)
    inverse = sample(model).apply(model)
    assert float(model.scale.detach()) == -2.5 and int(model.steps) == 9 and model.flags.tolist() == [False, False, True]
    assert torch.equal(bits(model.w)[~checker((6, 4))], bits(original.w)[~checker((6, 4))])
    again = inverse.apply(model)
    assert same(model, original)
    again.apply(model)
    assert not same(model, original) and torch.signbit(model.w.view(-1)[0]) and torch.isnan(model.w.view(-1)[4])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_inverse_of_low_rank_is_exact(dtype):
    model = Holder(dtype)
    original = copy.deepcopy(model)
    g = torch.Generator().manual_seed(1)
    patch = Patch((LowRank("w", torch.randn(6, 2, generator=g), torch.randn(2, 4, generator=g), 0.5),)).stamped(model)
    expected = original.w.detach() + (0.5 * patch.edits[0].up.to(dtype) @ patch.edits[0].down.to(dtype))
    inverse = patch.apply(model)
    torch.testing.assert_close(model.w.detach(), expected)
    inverse.apply(model)
    assert same(model, original)


def test_difference_holds_exactly_the_places_whose_bits_differ():
    before, after = Holder(), Holder()
    with torch.no_grad():
        after.w.view(-1)[5] = 8.0
        before.w.view(-1)[6], after.w.view(-1)[6] = 0.0, -0.0
        after.scale.fill_(0.25)
    patch = difference(dict(before.named_parameters()), dict(after.named_parameters()))
    change, scale = patch.edits
    assert change.mask.view(-1).nonzero().squeeze(1).tolist() == [5, 6] and scale.mask is None
    assert patch.places == 3
    patch.apply(before)
    assert same(before, after)
    assert len(difference(dict(before.named_parameters()), dict(after.named_parameters()))) == 0


def big(kind: str) -> tuple[nn.Module, Patch]:
    """A 64 x 64 layer and a patch on it whose file form is the named one."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = nn.Linear(64, 64)
    g = torch.Generator().manual_seed(2)
    if kind == "low rank":
        return model, Patch((LowRank("weight", torch.randn(64, 3, generator=g), torch.randn(3, 64, generator=g), 2.0),)).stamped(model)
    every = {"all": 1, "bits": 2, "index": 200}[kind]
    mask = None if kind == "all" else checker((64, 64), every)
    values = torch.randn(64, 64, generator=g)
    return model, Patch((Replace("weight", values if mask is None else values[mask], mask),)).stamped(model)


@pytest.mark.parametrize(("kind", "tensor"), [("all", "0.values"), ("bits", "0.bits"), ("index", "0.index"), ("low rank", "0.up")])
@pytest.mark.parametrize("key", [None, b"secret"])
def test_round_trip_on_disk(tmp_path, kind, tensor, key):
    from safetensors import safe_open

    model, patch = big(kind)
    path = patch.save(tmp_path / "p.safetensors", key)
    with safe_open(path, "pt") as f:
        assert tensor in set(f.keys())
    loaded = Patch.load(path, key)
    assert loaded.digest == patch.digest and dict(loaded.meta) == dict(patch.meta)
    other = copy.deepcopy(model)
    patch.apply(model)
    loaded.apply(other)
    assert same(model, other)
    assert [f.name for f in tmp_path.iterdir()] == ["p.safetensors"]
    assert path.stat().st_mode & 0o777 == 0o644


def test_masks_are_bits_when_dense_and_indices_when_sparse(tmp_path):
    sizes = {kind: big(kind)[1].save(tmp_path / kind).stat().st_size for kind in ("all", "bits", "index")}
    assert 64 * 64 * 4 <= sizes["all"] < 64 * 64 * 4 + 800
    assert 64 * 64 * 2 + 512 <= sizes["bits"] < 64 * 64 * 2 + 512 + 800
    assert sizes["index"] < 21 * 12 + 800


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_round_trip_of_every_type(tmp_path, dtype):
    model = Holder(dtype)
    patch = sample(model)
    loaded = Patch.load(patch.save(tmp_path / "p"))
    other = copy.deepcopy(model)
    patch.apply(model)
    loaded.apply(other)
    assert same(model, other)


@pytest.fixture
def small(tmp_path):
    """The bytes of a small signed patch file, and a function that loads other bytes in its place."""
    path = sample(Holder()).save(tmp_path / "small", b"secret")
    good = path.read_bytes()

    def load(raw: bytes) -> Patch:
        path.write_bytes(raw)
        return Patch.load(path, b"secret")

    assert load(good).digest == sample(Holder()).digest
    return good, load


def test_every_flipped_byte_is_refused(small):
    good, load = small
    for position in range(len(good)):
        raw = bytearray(good)
        raw[position] ^= 1 << (position % 8)
        with pytest.raises(PatchError):
            load(bytes(raw))


def test_every_truncation_is_refused(small):
    good, load = small
    for length in range(len(good)):
        with pytest.raises(PatchError):
            load(good[:length])
    with pytest.raises(PatchError):
        load(good + b"\0")


def test_wrong_key_unsigned_missing_and_foreign_files(tmp_path):
    from safetensors.torch import save_file

    patch = sample(Holder())
    signed, plain = patch.save(tmp_path / "signed", b"secret"), patch.save(tmp_path / "plain")
    assert Patch.load(signed).digest == patch.digest
    for path, key in ((signed, b"other"), (plain, b"secret")):
        with pytest.raises(PatchError, match=f"{path.name} is not signed by this key"):
            Patch.load(path, key)
    with pytest.raises(PatchError, match="cannot read nowhere"):
        Patch.load(tmp_path / "nowhere")
    save_file({"a": torch.zeros(1)}, tmp_path / "foreign")
    with pytest.raises(PatchError, match="foreign is a safetensors file but no expunge patch"):
        Patch.load(tmp_path / "foreign")
    (tmp_path / "text").write_text("hello")
    with pytest.raises(PatchError, match="text is no patch, or is truncated"):
        Patch.load(tmp_path / "text")


def test_applied_twice_or_to_another_model_is_refused():
    model, other = Holder(), Holder(seed=1)
    patch = sample(model)
    patch.apply(model)
    for target in (model, other):
        before = raw(target)
        with pytest.raises(PatchError, match="applied already, or another model"):
            patch.apply(target)
        assert all(torch.equal(v, before[n]) for n, v in raw(target).items())
    patch.apply(other, force=True)
    assert int(other.steps) == 9


@pytest.mark.parametrize(
    ("model", "message"),
    [
        (nn.Linear(2, 2), "patch edits w, which this model does not have"),
        (Holder(torch.float16), r"patch holds w as \(6, 4\) torch.float32, this model has \(6, 4\) torch.float16"),
    ],
)
def test_models_that_do_not_fit(model, message):
    before = raw(model)
    for force in (False, True):
        with pytest.raises(PatchError, match=message):
            sample(Holder()).apply(model, force=force)
    assert all(torch.equal(v, before[n]) for n, v in raw(model).items())


def test_two_patches_as_one():
    model = Holder()
    left, right = checker((6, 4)), ~checker((6, 4))
    a = Patch((Replace("w", torch.zeros(12), left),)).stamped(model)
    b = Patch((Replace("w", torch.ones(12), right),)).stamped(model)
    both = (a | b).stamped(model)
    both.apply(model)
    assert torch.equal(model.w.detach(), right.float())
    for clash in (a, Patch((Replace("w", torch.zeros(6, 4)),)), Patch((LowRank("w", torch.zeros(6, 1), torch.zeros(1, 4)),))):
        with pytest.raises(PatchError, match="both patches edit the same places of w; apply them one after another"):
            a | clash


def test_disk_that_fills_up_leaves_nothing_half_written(tmp_path, monkeypatch):
    path = tmp_path / "p"
    path.write_bytes(b"old")

    def full(_):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(PatchError, match="cannot write p: No space left on device; nothing was left half-written"):
        sample(Holder()).save(path)
    assert [f.name for f in tmp_path.iterdir()] == ["p"] and path.read_bytes() == b"old"


def test_real_write_beyond_the_file_size_limit(tmp_path):
    """The operating system itself cuts the write short: the old file stands, no temporary file is left."""
    path = tmp_path / "p"
    path.write_bytes(b"old")
    code = (
        "import resource, signal, sys\n"
        "from expunge.core.errors import PatchError\n"
        "from expunge.core.patch import write\n"
        "signal.signal(signal.SIGXFSZ, signal.SIG_IGN)\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (4096, 4096))\n"
        "try:\n"
        "    write(sys.argv[1], b'x' * 100_000)\n"
        "except PatchError as error:\n"
        "    print(error)\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, str(path)], capture_output=True, text=True, env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}, check=True
    )
    assert "cannot write p: File too large; nothing was left half-written" in done.stdout
    assert [f.name for f in tmp_path.iterdir()] == ["p"] and path.read_bytes() == b"old"


def test_folder_that_cannot_be_made(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(PatchError, match="cannot write p"):
        write(tmp_path / "file" / "p", b"")


# ---- identity -----------------------------------------------------------------------------------------------------------------------------------------------


class Small(nn.Module):
    """Parameters a, b (2, 2), and a square one and a vector whose values, as bytes, may equal one another's."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Parameter(torch.full((2, 2), 0.25)), nn.Parameter(torch.full((2, 2), -0.5))


NUMBERS = st.sampled_from([0.0, -0.0, 1.0, 3.0])
NAMES = st.sampled_from(["a", "b"])


def tensor(shape: tuple[int, ...]) -> st.SearchStrategy[torch.Tensor]:
    n = torch.Size(shape).numel()
    return st.lists(NUMBERS, min_size=n, max_size=n).map(lambda v: torch.tensor(v).view(shape))


@st.composite
def edit(draw) -> Replace | LowRank:
    name, kind = draw(NAMES), draw(st.sampled_from(["all", "mask", "low rank"]))
    if kind == "low rank":
        return LowRank(name, draw(tensor((2, 1))), draw(tensor((1, 2))), draw(st.sampled_from([1.0, -7.0, 0.0, -0.0])))
    if kind == "all":
        return Replace(name, draw(tensor((2, 2))))
    mask = torch.tensor(draw(st.lists(st.booleans(), min_size=4, max_size=4))).view(2, 2)
    return Replace(name, draw(tensor((int(mask.sum()),))), mask)


@st.composite
def pair(draw) -> tuple[Patch, Patch]:
    """A patch, and another that is it in another order, or it with one thing changed, or any."""
    edits = draw(st.lists(edit(), min_size=1, max_size=3))
    how, k = draw(st.sampled_from(["order", "one edit", "scale", "name", "any"])), draw(st.integers(0, len(edits) - 1))
    other = list(edits)
    if how == "order":
        other = draw(st.permutations(edits))
    elif how == "any":
        other = draw(st.lists(edit(), min_size=1, max_size=3))
    elif how == "one edit":
        other[k] = draw(edit())
    elif how == "name":
        other[k] = replace(edits[k], name=draw(NAMES))
    elif isinstance(edits[k], LowRank):
        other[k] = replace(edits[k], scale=draw(st.sampled_from([1.0, -7.0, 0.0, -0.0])))
    return Patch(tuple(edits)), Patch(tuple(other))


def facts(t: torch.Tensor | None) -> tuple | None:
    return None if t is None else (str(t.dtype), tuple(t.shape), bits(t).flatten().tolist())


def meaning(patch: Patch) -> list[list[tuple]]:
    """Per name, in order, all that an edit holds: a slow form of what the digest covers."""
    found: dict[str, list[tuple]] = {}
    for e in patch.edits:
        mine = ("low rank", float(e.scale).hex(), facts(e.up), facts(e.down)) if isinstance(e, LowRank) else ("replace", facts(e.values), facts(e.mask))
        found.setdefault(e.name, []).append((e.name, *mine))
    return [found[name] for name in sorted(found)]


def written(patch: Patch) -> dict[str, list[int]]:
    model = Small()
    patch.apply(model)
    return {n: v.flatten().tolist() for n, v in raw(model).items()}


@settings(deadline=None, max_examples=400)
@given(pair())
def test_equal_digests_are_equal_edits_and_write_equal_bits(both):
    """Order counts where one name is edited twice, and only there."""
    one, other = both
    assert (one.digest == other.digest) == (meaning(one) == meaning(other))
    if one.digest == other.digest:
        assert written(one) == written(other)


@settings(deadline=None, max_examples=200)
@given(tensor((2, 2)), tensor((2, 2)), tensor((2, 2)), tensor((2, 2)))
def test_differences_have_one_digest_if_and_only_if_they_write_the_same_bits(a, b, c, d):
    """For the patches that methods leave, which hold the places that moved and no other, the digest is a name of what is written."""
    before = {"a": torch.full((2, 2), 0.25), "b": torch.full((2, 2), -0.5)}
    one, other = difference(before, {"a": a, "b": b}), difference(before, {"b": d, "a": c})
    assert (one.digest == other.digest) == (written(one) == written(other))


def variants() -> dict[str, Patch]:
    """Patches of which no two are the same, each near another."""
    square, up, down = torch.tensor([[1.0, 2.0], [3.0, 4.0]]), torch.tensor([[1.0], [2.0]]), torch.tensor([[3.0, 4.0]])
    everywhere = torch.ones(2, 2, dtype=torch.bool)
    half = torch.tensor([[True, True], [False, False]])
    eye = {"weight": torch.ones(2), "bias": torch.zeros(2)}
    low = lambda **changed: LowRank(**{"name": "a", "up": up, "down": down, "scale": 1.0, **changed})  # noqa: E731
    hook = lambda **changed: Hook(**{"name": "a", "kind": "refuse", "tensors": eye, "config": {"t": 1}, **changed})  # noqa: E731
    edits = {
        "replace": [Replace("a", square)], "other name": [Replace("b", square)], "other values": [Replace("a", square * 2)],
        "-0.0": [Replace("a", -torch.zeros(2, 2))], "0.0": [Replace("a", torch.zeros(2, 2))],
        "other shape": [Replace("a", square.view(4))], "other type": [Replace("a", square.view(torch.int32))],
        "mask of all": [Replace("a", square.view(4), everywhere)], "mask": [Replace("a", square.view(4)[:2], half)],
        "other places": [Replace("a", square.view(4)[:2], ~half)], "mask of another shape": [Replace("a", square.view(4)[:2], half.view(4))],
        "low rank": [low()], "scale": [low(scale=-7.0)], "scale 0": [low(scale=0.0)], "scale -0": [low(scale=-0.0)],
        "up and down changed places": [low(up=down.T.contiguous(), down=up.T.contiguous())], "half precision": [low(up=up.half(), down=down.half())],
        "up as values": [Replace("a", up)], "up as values, down as values": [Replace("a", up), Replace("a", down)],
        "down first": [Replace("a", down), Replace("a", up)], "one edit twice": [Replace("a", square), Replace("a", square)],
        "nothing": [], "guard": [hook()], "guard of another name": [hook(name="b")], "guard of another kind": [hook(kind="corrupt")],
        "guard of another policy": [hook(config={"t": 1.0})], "true is not 1": [hook(config={"t": True})],
        "tensors of other names": [hook(tensors={"weight": torch.ones(2), "biases": torch.zeros(2)})],
        "fewer tensors": [hook(tensors={"weight": torch.ones(2)})], "a stroke in the name": [hook(name="a/refuse", kind="x")],
        "a stroke in the kind": [hook(name="a", kind="refuse/x")], "two guards": [hook(), hook(name="b")], "the other inside": [hook(name="b"), hook()],
    }  # fmt: skip
    return {name: Patch(tuple(listed)) for name, listed in edits.items()}


def test_whatever_differs_has_a_digest_of_its_own():
    found: dict[str, list[str]] = {}
    for name, patch in variants().items():
        found.setdefault(patch.digest, []).append(name)
    assert [names for names in found.values() if len(names) > 1] == []


def test_a_name_that_spells_another_edit_is_not_one():
    """Parts are told apart by their lengths, not by what stands in them: a name that reads like an edit and the name of the next is one name."""
    zero, one = torch.zeros(1, dtype=torch.uint8), torch.ones(1, dtype=torch.uint8)
    spelled = "atorch.uint8(1,)\0b"
    assert Patch((Replace("a", zero), Replace("b", one))).digest != Patch((Replace(spelled, one),)).digest
    assert Hook("g", "k", {"a": zero, "b": one}).digest != Hook("g", "k", {spelled: one}).digest


def test_meta_is_no_part_of_the_digest_and_names_of_any_kind_have_one():
    patch = Patch((Replace("a", torch.ones(2)),))
    assert Patch(patch.edits, {"method": "x"}).digest == patch.digest and len(patch.digest) == 64
    assert Patch((Replace("\ud800", torch.ones(2)),)).digest != patch.digest
