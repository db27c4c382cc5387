"""Files are equal to the bit for us and for stock readers, and are never lost or half there."""

from __future__ import annotations

import mmap
import pickle
import subprocess
import sys
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from hypothesis import given, settings, strategies as st
from safetensors import safe_open
from torch import Tensor, nn

from core.errors import CheckpointError
from core_fastpersist.direct.memory import pages
from core_fastpersist.direct.newfile import NewFile, WriteOptions
from core_fastpersist.files.leaves import NAMES
from core_fastpersist.files.loading import inspect_file, load
from core_fastpersist.files.storing import save
from core_fastpersist.files.views import as_bytes, bits

DTYPES = sorted(
    {
        value
        for name in dir(torch)
        if isinstance(value := getattr(torch, name), torch.dtype) and not name.startswith("q")
    },
    key=str,
)
STORED = [dtype for dtype in DTYPES if dtype in NAMES]
pytestmark = pytest.mark.filterwarnings("ignore:ComplexHalf:UserWarning")


def random_tensor(shape: tuple[int, ...], dtype: torch.dtype, seed: int = 0) -> Tensor:
    """Any bits at all: NaN payloads, infinities and -0.0 among them."""
    count = int(torch.Size(shape).numel()) * dtype.itemsize
    generator = torch.Generator().manual_seed(seed)
    top = 2 if dtype is torch.bool else 256
    data = torch.randint(0, top, (count,), dtype=torch.uint8, generator=generator)
    empty = torch.empty(0, dtype=dtype)
    stride = torch.empty(shape, device="meta").stride()
    return empty.set_(data.untyped_storage(), 0, shape, stride)


def raw(tensor: Tensor) -> bytes:
    return as_bytes(bits(tensor.detach()).contiguous()).numpy().tobytes()


def same(a: Tensor, b: Tensor) -> bool:
    return a.dtype == b.dtype and a.shape == b.shape and raw(a) == raw(b)


def require_same(a: Any, b: Any) -> None:
    assert type(a) is type(b)
    if isinstance(a, Tensor):
        assert same(a, b)
    elif isinstance(a, dict):
        assert [*a] == [*b]
        for key in a:
            require_same(a[key], b[key])
    elif isinstance(a, list | tuple):
        assert len(a) == len(b)
        for first, second in zip(a, b, strict=True):
            require_same(first, second)
    else:
        assert a == b


@pytest.fixture(params=["read", "mmap", "unverified"])
def loader(request: pytest.FixtureRequest) -> Callable[[Path], Any]:
    options = {"read": {}, "mmap": {"mmap": True}, "unverified": {"verify": False}}
    return lambda path: load(path, **options[request.param])


def all_dtypes() -> dict[str, Tensor]:
    found = {}
    for seed, dtype in enumerate(DTYPES):
        for shape in [(), (0,), (3, 0, 2), (1,), (5, 3), (3001,)]:
            found[f"{dtype}.{shape}"] = random_tensor(shape, dtype, seed)
    return found


def test_every_dtype_and_any_bits_come_back(tmp_path: Path, loader: Callable[[Path], Any]) -> None:
    state = all_dtypes()
    save(state, tmp_path / "all.safetensors")
    require_same(state, loader(tmp_path / "all.safetensors"))


def test_stock_readers_see_the_same_names_and_bits(tmp_path: Path) -> None:
    path = tmp_path / "all.safetensors"
    state = {k: v for k, v in all_dtypes().items() if v.dtype in STORED}
    state["__last"] = torch.randn(4, 4)
    save(state, path)
    with safe_open(path, "pt") as file:
        assert {*file.keys()} == {*state}
        for name, tensor in state.items():
            assert same(file.get_tensor(name), tensor)
    for name, tensor in safetensors.torch.load_file(path).items():
        assert same(tensor, state[name])


def test_every_tensor_is_aligned_to_its_elements_for_readers_that_map_the_file(
    tmp_path: Path,
) -> None:
    state = {
        str(index): random_tensor((size,), dtype, index)
        for index, (size, dtype) in enumerate([(n, d) for n in (1, 3, 7, 64) for d in DTYPES])
    }
    block = torch.zeros(103, dtype=torch.uint8)
    state |= {"a": block[:100].view(torch.float32), "b": block[50:], "odd": block[:3]}
    save(state, tmp_path / "x.safetensors")
    found = inspect_file(tmp_path / "x.safetensors")
    end = found.start
    for tensor in found.tensors:
        assert tensor.begin == end
        end = tensor.end
    loaded = load(tmp_path / "x.safetensors", mmap=True)
    for name, tensor in loaded.items():
        assert tensor.data_ptr() % tensor.itemsize == 0, name
    require_same(state, loaded)


def test_files_of_other_programs_are_read(tmp_path: Path, loader: Callable[[Path], Any]) -> None:
    state = {"odd": torch.arange(3, dtype=torch.uint8), "w": torch.randn(50, 3)}
    safetensors.torch.save_file(state, tmp_path / "foreign.safetensors")
    found = loader(tmp_path / "foreign.safetensors")
    assert {*found} == {*state}
    assert all(same(found[name], state[name]) for name in state)
    into = {name: torch.zeros_like(tensor) for name, tensor in state.items()}
    load(tmp_path / "foreign.safetensors", into=into)
    assert all(same(into[name], state[name]) for name in state)


def test_misaligned_tensors_of_other_programs_are_copied(tmp_path: Path) -> None:
    header = (
        b'{"a":{"dtype":"U8","shape":[1],"data_offsets":[0,1]},'
        b'"b":{"dtype":"F64","shape":[2],"data_offsets":[1,17]}}'
    )
    content = torch.tensor([1.5, -2.0], dtype=torch.float64)
    path = tmp_path / "odd.safetensors"
    path.write_bytes(len(header).to_bytes(8, "little") + header + b"\x07" + raw(content))
    for kwargs in ({}, {"mmap": True}):
        found = load(path, **kwargs)
        assert same(found["b"], content)
        assert found["b"].data_ptr() % 8 == 0


def test_tied_weights_stay_tied(tmp_path: Path, loader: Callable[[Path], Any]) -> None:
    weight = torch.randn(20, 4)
    state = {"in": weight, "out": weight, "row": weight[3], "flat": weight.view(-1)[8:16]}
    state["bits"] = weight.view(torch.int32)
    path = tmp_path / "tied.safetensors"
    save(state, path)
    assert [tensor.name for tensor in inspect_file(path).tensors] == ["in"]
    found = loader(path)
    require_same(state, found)
    found["in"].zero_()
    assert all(not tensor.any() for tensor in found.values())


def test_overlapping_parts_share_memory_again(tmp_path: Path) -> None:
    block = torch.randn(100)
    state = {
        "left": block[10:60],
        "right": block[40:90],
        "even": torch.arange(12.0).view(6, 2)[:, 0],
    }
    columns = torch.randn(4, 6)
    state |= {"q": columns[:, :3], "k": columns[:, 3:]}
    path = tmp_path / "parts.safetensors"
    save(state, path)
    assert [tensor.nbytes for tensor in state.values()] == [200, 200, 24, 48, 48]
    assert sum(t.end - t.begin for t in inspect_file(path).tensors) == 320 + 24 + 96
    found = load(path)
    require_same(state, found)
    assert found["q"].stride() == (6, 1)
    found["left"].zero_()
    assert not found["right"][:20].any()
    assert same(found["right"][20:], state["right"][20:])


def test_layouts_are_restored_and_stock_readers_see_the_values(tmp_path: Path) -> None:
    state = {
        "channels_last": torch.randn(2, 3, 4, 5).to(memory_format=torch.channels_last),
        "transposed": torch.randn(3, 4).t(),
        "fp8": random_tensor((8, 4), torch.float8_e4m3fn).t(),
        "complex128": random_tensor((8, 4), torch.complex128).t(),
        "expanded": torch.randn(3, 1).expand(3, 1000),
        "scalar": torch.tensor(3.0).expand(2, 2),
    }
    path = tmp_path / "layouts.safetensors"
    save(state, path)
    found = load(path)
    require_same(state, found)
    for name, tensor in state.items():
        assert found[name].stride() == tensor.stride(), name
    assert found["expanded"].untyped_storage().nbytes() == 12
    stock = safetensors.torch.load_file(path)
    for name in state.keys() - {"complex128"}:
        assert same(stock[name], state[name])


def test_a_view_that_begins_between_elements_of_the_tensor_that_covers_it(
    tmp_path: Path,
) -> None:
    block = random_tensor((64,), torch.uint8)
    state = {"cover": block[6:40], "inside": block.view(torch.float64)[1:4]}
    save(state, tmp_path / "x.safetensors")
    found = load(tmp_path / "x.safetensors")
    require_same(state, found)
    found["cover"].zero_()
    assert not bits(found["inside"]).any()


def test_part_of_a_larger_tensor_is_stored_alone(tmp_path: Path) -> None:
    state = {"slice": torch.randn(100, 100)[5:7, ::3]}
    save(state, tmp_path / "x.safetensors")
    assert inspect_file(tmp_path / "x.safetensors").tensors[0].shape == (2, 34)
    require_same(state, load(tmp_path / "x.safetensors"))


def test_conjugate_and_negative_views_are_resolved(tmp_path: Path) -> None:
    z = torch.randn(5, dtype=torch.complex64)
    save([z.conj(), z.conj().imag], tmp_path / "x.safetensors")
    conj, imag = load(tmp_path / "x.safetensors")
    assert torch.equal(conj, z.conj())
    assert torch.equal(imag, -z.imag)


@settings(max_examples=60, deadline=None)
@given(data=st.data())
def test_any_views_of_one_memory_come_back(
    tmp_path_factory: pytest.TempPathFactory, data: st.DataObject
) -> None:
    base = random_tensor((256,), torch.uint8, data.draw(st.integers(0, 9)))
    views = []
    for _ in range(data.draw(st.integers(1, 6))):
        dtype = data.draw(
            st.sampled_from([torch.uint8, torch.float16, torch.int32, torch.complex64])
        )
        typed = base.view(dtype)
        begin = data.draw(st.integers(0, len(typed) - 1))
        rows, columns = data.draw(st.integers(0, 4)), data.draw(st.integers(1, 4))
        stride = data.draw(st.tuples(st.integers(0, 5), st.integers(0, 5)))
        if begin + max(0, rows - 1) * stride[0] + (columns - 1) * stride[1] < len(typed):
            views.append(typed.as_strided((rows, columns), stride, begin))
    path = tmp_path_factory.mktemp("views", numbered=True) / "x.safetensors"
    save(views, path)
    require_same(views, load(path))
    into = [torch.zeros(view.shape, dtype=view.dtype) for view in views]
    require_same(views, load(path, into=into))


def test_ten_thousand_tensors(tmp_path: Path) -> None:
    flat = torch.randn(12_000, 7)
    state = {f"layer.{i}.weight": flat[i].clone() for i in range(12_000)}
    path = tmp_path / "many.safetensors"
    save(state, path)
    require_same(state, load(path))
    with safe_open(path, "pt") as file:
        assert same(file.get_tensor("layer.11999.weight"), flat[11_999])


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
@pytest.mark.parametrize("suffix", ["safetensors", "pt"])
def test_a_model_and_its_optimizer_train_on_as_if_nothing_had_happened(
    tmp_path: Path, kind: str, suffix: str
) -> None:
    model, optimizer = trained(kind, steps=2)
    state = {"model": model.state_dict(), "optimizer": optimizer.state_dict()}
    path = tmp_path / f"state.{suffix}"
    save(state, path)
    found = load(path)
    fresh, fresh_optimizer = trained(kind, steps=0)
    fresh.load_state_dict(found["model"])
    fresh_optimizer.load_state_dict(found["optimizer"])
    step(model, optimizer)
    step(fresh, fresh_optimizer)
    for (name, first), second in zip(model.named_parameters(), fresh.parameters(), strict=True):
        assert same(first, second), name
    if suffix == "safetensors":
        stock = safetensors.torch.load_file(path)
        assert {f"model.{name}" for name, _ in model.named_parameters()} <= stock.keys()
    tied = found["model"]["lm_head.weight"].data_ptr()
    assert (
        tied == next(v for k, v in found["model"].items() if "embed" in k or "wte" in k).data_ptr()
    )


def trained(kind: str, steps: int) -> tuple[nn.Module, torch.optim.Optimizer]:
    from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    model: nn.Module
    if kind == "llama":
        model = LlamaForCausalLM(
            LlamaConfig(
                vocab_size=64,
                hidden_size=32,
                intermediate_size=48,
                num_hidden_layers=2,
                num_attention_heads=4,
                tie_word_embeddings=True,
            )
        )
    else:
        config = GPT2Config(vocab_size=64, n_embd=32, n_layer=2, n_head=4, n_positions=32)
        model = GPT2LMHeadModel(config)
    model.eval()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    for _ in range(steps):
        step(model, optimizer)
    return model, optimizer


def step(model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    tokens = torch.arange(16).view(2, 8)
    model(input_ids=tokens, labels=tokens).loss.backward()
    optimizer.step()
    optimizer.zero_grad()


@pytest.mark.parametrize("size", [3, 1000, 700_000])
def test_live_tensors_are_filled_in_place(tmp_path: Path, size: int) -> None:
    weight = torch.randn(size)
    state = {
        "w": weight,
        "tied": weight,
        "many": [torch.randn(size + i) for i in range(3)],
        "last": torch.randn(2, 3, 4, 5).to(memory_format=torch.channels_last),
        "half": torch.randn(5).to(torch.bfloat16),
        "c": random_tensor((3,), torch.complex128),
        "step": 7,
    }
    path = tmp_path / "x.safetensors"
    save(state, path, options=WriteOptions(chunk=2**20))
    for verify in (True, False):
        into = {
            "w": nn.Parameter(torch.zeros(size)),
            "tied": torch.zeros(size),
            "many": [torch.zeros(2 * (size + i))[::2] for i in range(2)] + [torch.zeros(size + 2)],
            "last": torch.zeros(2, 3, 4, 5),
            "half": torch.zeros(5, dtype=torch.bfloat16),
            "c": torch.zeros(3, dtype=torch.complex128),
            "step": 0,
        }
        found = load(path, into=into, verify=verify)
        assert found["w"] is into["w"]
        assert found["many"][1] is into["many"][1]
        assert found["step"] == 7
        require_same(state | {"w": 0}, found | {"w": 0})
        assert same(found["w"], weight)


def test_a_live_arena_is_filled_without_touching_what_lies_beside_it(tmp_path: Path) -> None:
    count = 2_000_000
    arena = torch.frombuffer(pages(12 * count), dtype=torch.float32)
    state = {"a": torch.randn(count), "b": torch.randn(count)}
    save(state, tmp_path / "x.safetensors", options=WriteOptions(chunk=2**20))
    arena.fill_(5.0)
    first = inspect_file(tmp_path / "x.safetensors").start % 4096 // 4
    into = {"a": arena[first : first + count], "b": arena[first + count : first + 2 * count]}
    load(tmp_path / "x.safetensors", into=into)
    require_same(state, into)
    assert bool((arena[:first] == 5).all())
    assert bool((arena[first + 2 * count :] == 5).all())


@pytest.mark.parametrize(
    ("into", "complaint"),
    [
        ({"a": torch.zeros(3)}, "structure than the file at its root: only one of them has b"),
        ({"a": torch.zeros(3), "b": [1], "c": 2}, "only one of them has c"),
        ({"a": torch.zeros(4), "b": [1]}, r"'a' does not fit.*\[3\].*\[4\]"),
        ({"a": torch.zeros(3, dtype=torch.float64), "b": [1]}, "'a' does not fit.*float64"),
        ({"a": torch.zeros(3, device="meta"), "b": [1]}, "meta device"),
        ({"a": 1, "b": [1]}, "has a tensor at 'a'"),
        ({"a": torch.zeros(3), "b": torch.zeros(1)}, "structure .* at 'b'"),
    ],
)
def test_live_trees_that_do_not_fit_are_refused(tmp_path: Path, into: Any, complaint: str) -> None:
    save({"a": torch.ones(3), "b": [1]}, tmp_path / "x.safetensors")
    with pytest.raises(CheckpointError, match=complaint) as caught:
        load(tmp_path / "x.safetensors", into=into)
    assert "x.safetensors" in str(caught.value)


def test_damage_is_found_when_live_tensors_are_filled(tmp_path: Path) -> None:
    path = tmp_path / "x.safetensors"
    save({"a": torch.zeros(700_000), "b": torch.zeros(3)}, path)
    content = bytearray(path.read_bytes())
    content[1_000_000] ^= 4
    path.write_bytes(content)
    into = {"a": torch.zeros(700_000), "b": torch.zeros(3)}
    with pytest.raises(CheckpointError, match="is damaged in bytes"):
        load(path, into=into)


def test_bytes_go_straight_from_an_arena_that_is_laid_out_like_the_file(tmp_path: Path) -> None:
    sizes = [
        (torch.float32, 300_001),
        (torch.float32, 7),
        (torch.bfloat16, 500_003),
        (torch.uint8, 9),
    ]
    total = sum(dtype.itemsize * count for dtype, count in sizes)
    memory = torch.frombuffer(pages(total + 4096), dtype=torch.uint8)
    state, position = {}, 64
    for index, (dtype, count) in enumerate(sizes):
        state[str(index)] = memory[position:][: dtype.itemsize * count].view(dtype)
        state[str(index)].copy_(torch.arange(count).to(dtype))
        position += dtype.itemsize * count
    report = save(state, tmp_path / "x.safetensors")
    require_same(state, load(tmp_path / "x.safetensors"))
    if not report.direct:
        pytest.skip("no direct I/O here")
    assert report.straight >= total - 2 * 4096


def test_pt_files_are_read_by_torch(tmp_path: Path) -> None:
    weight = torch.randn(1000, 50)
    state = {
        "w": weight,
        "tied": weight,
        "row": weight[3],
        "t": weight.t(),
        "e": torch.empty(0),
        "p": nn.Parameter(torch.ones(3)),
        "nested": [{"half": torch.randn(5).to(torch.bfloat16)}, 7, "text"],
        **{f"many.{i}": torch.randn(i) for i in range(50)},
    }
    before = torch.utils.serialization.config.save.storage_alignment
    for name in ("x.pt", "x.pth", "x.other"):
        report = save(state, tmp_path / name, format="pt" if name == "x.other" else None)
        assert report.bytes == (tmp_path / name).stat().st_size
        for kwargs in ({}, {"mmap": True}):
            found = torch.load(tmp_path / name, weights_only=True, **kwargs)
            require_same(state, found)
            assert found["w"].data_ptr() == found["tied"].data_ptr()
            require_same(state, load(tmp_path / name, **kwargs))
        assert zipfile.is_zipfile(tmp_path / name)
    assert torch.utils.serialization.config.save.storage_alignment == before
    into = {**state, "w": torch.zeros(1000, 50)}
    load(tmp_path / "x.pt", into=into)
    assert same(into["w"], weight)


def test_a_large_pt_file_takes_no_memory_of_its_size(tmp_path: Path) -> None:
    code = (
        "import resource, sys, torch\n"
        "from core_fastpersist.files.storing import save\n"
        "state = {'w': torch.zeros(75_000_000)}\n"
        "save({'w': torch.zeros(9)}, sys.argv[1])\n"
        "state['w'].fill_(1)\n"
        "before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss\n"
        "save(state, sys.argv[1])\n"
        "print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, str(tmp_path / "x.pt")],
        capture_output=True,
        text=True,
        check=True,
    )
    assert int(done.stdout) * 1024 < 60_000_000


@pytest.mark.parametrize("name", ["x.safetensors", "x.pt"])
def test_a_smaller_state_replaces_a_larger_one(tmp_path: Path, name: str) -> None:
    save({"w": torch.randn(300_000)}, tmp_path / name)
    save({"w": torch.ones(3)}, tmp_path / name)
    require_same({"w": torch.ones(3)}, load(tmp_path / name))
    assert [path.name for path in tmp_path.iterdir()] == [name]


@pytest.mark.parametrize("name", ["x.safetensors", "x.pt"])
@pytest.mark.parametrize("call", ["write", "sync", "write_head", "second sync", "rename"])
def test_a_failure_anywhere_keeps_the_previous_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, call: str
) -> None:
    old = {"w": torch.randn(1000)}
    save(old, tmp_path / name)
    calls = 0

    def fail(*args: Any, **kwargs: Any) -> None:
        raise OSError(28, "No space left on device")

    def fail_later(self: NewFile) -> None:
        nonlocal calls
        calls += 1
        if calls == 2:
            fail()

    with monkeypatch.context() as patch:
        if call == "rename":
            patch.setattr(Path, "replace", fail)
        elif call == "second sync":
            patch.setattr(NewFile, "sync", fail_later)
        else:
            patch.setattr(NewFile, call, fail)
        with pytest.raises(CheckpointError, match="No space left"):
            save({"w": torch.zeros(2000)}, tmp_path / name)
    assert [path.name for path in tmp_path.iterdir()] == [name]
    require_same(old, load(tmp_path / name))


@pytest.mark.parametrize("name", ["x.safetensors", "x.pt"])
def test_a_full_disk_is_one_error_and_keeps_the_previous_file(tmp_path: Path, name: str) -> None:
    old = {"w": torch.randn(1000)}
    save(old, tmp_path / name)
    code = (
        "import resource, signal, sys, torch\n"
        "from core.errors import CheckpointError\n"
        "from core_fastpersist.files.storing import save\n"
        "state = {'w': torch.zeros(2_000_000)}\n"
        "signal.signal(signal.SIGXFSZ, signal.SIG_IGN)\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (1_000_000, 1_000_000))\n"
        "try:\n"
        "    save(state, sys.argv[1])\n"
        "except CheckpointError as error:\n"
        "    print('refused:', error)\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, str(tmp_path / name)],
        capture_output=True,
        text=True,
        check=True,
    )
    assert "refused:" in done.stdout
    assert [path.name for path in tmp_path.iterdir()] == [name]
    require_same(old, load(tmp_path / name))


def test_what_maps_the_old_file_keeps_it(tmp_path: Path) -> None:
    path = tmp_path / "x.safetensors"
    old = {"w": torch.randn(100_000)}
    save(old, path)
    mapped = load(path, mmap=True)
    with path.open("rb") as file:
        view = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
    content = view[:]
    save({"w": torch.zeros(10)}, path)
    assert view[:] == content
    require_same(old, mapped)


def test_a_mapped_tensor_can_be_changed_without_changing_the_file(tmp_path: Path) -> None:
    path = tmp_path / "x.safetensors"
    save({"w": torch.ones(1000)}, path)
    load(path, mmap=True)["w"].zero_()
    require_same({"w": torch.ones(1000)}, load(path))


class Trap:
    """An object whose pickle runs code."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> Any:
        return Path.touch, (self.path,)


@pytest.mark.parametrize("name", ["x.safetensors", "x.pt"])
def test_an_untrusted_pickle_is_refused_and_not_run(tmp_path: Path, name: str) -> None:
    trap = tmp_path / "trap"
    save({"w": torch.ones(2), "bad": Trap(trap)}, tmp_path / name, pickle_objects=True)
    with pytest.raises(CheckpointError, match="trust_pickles=True"):
        load(tmp_path / name)
    assert not trap.exists()
    load(tmp_path / name, trust_pickles=True)
    assert trap.exists()


@pytest.mark.filterwarnings("ignore:Detected pickle protocol")
def test_a_plain_pickle_called_pt_is_refused_and_not_run(tmp_path: Path) -> None:
    trap = tmp_path / "trap"
    (tmp_path / "x.pt").write_bytes(pickle.dumps(Trap(trap)))
    with pytest.raises(CheckpointError, match=r"x\.pt"):
        load(tmp_path / "x.pt")
    assert not trap.exists()


@pytest.mark.parametrize("cut", [0, 3, 5000, -1])
def test_a_truncated_pt_file_is_refused(tmp_path: Path, cut: int) -> None:
    path = tmp_path / "x.pt"
    save({"w": torch.ones(3000)}, path)
    path.write_bytes(path.read_bytes()[:cut])
    with pytest.raises(CheckpointError, match=r"x\.pt"):
        load(path)


def test_an_existing_file_is_kept_when_asked(tmp_path: Path) -> None:
    path = tmp_path / "deep" / "folder" / "x.safetensors"
    save([torch.ones(1)], path, overwrite=False)
    with pytest.raises(CheckpointError, match="exists already"):
        save([torch.zeros(1)], path, overwrite=False)
    require_same([torch.ones(1)], load(path))


def test_paths_that_are_no_file_are_refused(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="it is a folder"):
        save({}, tmp_path)
    with pytest.raises(CheckpointError, match=r"cannot (read|load)"):
        load(tmp_path)
    with pytest.raises(CheckpointError, match="No such file"):
        load(tmp_path / "none.safetensors")
    (tmp_path / "x.txt").write_text("hello, this is no checkpoint at all")
    with pytest.raises(CheckpointError, match=r"x\.txt"):
        load(tmp_path / "x.txt")


def test_nothing_at_all_can_be_saved(tmp_path: Path) -> None:
    for value in ({}, [], None, 5, {"e": torch.empty(0)}):
        save(value, tmp_path / "x.safetensors")
        require_same(value, load(tmp_path / "x.safetensors"))
        require_same(value, load(tmp_path / "x.safetensors", mmap=True))


def test_the_same_state_gives_the_same_answer_with_any_options(tmp_path: Path) -> None:
    state = {"a": torch.randn(300_000), "b": torch.randn(500, 500).t(), "c": [torch.tensor(1)]}
    for chunk in (4096, 2**18, 2**24):
        for threads in (1, 4):
            for direct in (None, False):
                options = WriteOptions(chunk, threads, ring=2**16, direct=direct)
                report = save(state, tmp_path / "x.safetensors", options=options)
                assert report.bytes == (tmp_path / "x.safetensors").stat().st_size
                require_same(state, load(tmp_path / "x.safetensors"))


@pytest.mark.gpu
def test_tensors_of_a_gpu_come_back(tmp_path: Path) -> None:
    if not torch.cuda.is_available():
        pytest.skip("no CUDA device")
    weight = torch.randn(3000, 1000, device="cuda")
    state = {"w": weight, "tied": weight, "t": weight[:10].t(), "cpu": torch.ones(3)}
    for name in ("x.safetensors", "x.pt"):
        save(state, tmp_path / name)
        require_same(torch.utils._pytree.tree_map(Tensor.cpu, state), load(tmp_path / name))
    there = load(tmp_path / "x.safetensors", map_location="cuda")
    assert there["w"].data_ptr() == there["tied"].data_ptr()
    assert torch.equal(there["w"], weight)
    into = {"w": torch.zeros_like(weight), "tied": torch.zeros_like(weight)}
    into |= {"t": torch.zeros(1000, 10, device="cuda"), "cpu": torch.zeros(3)}
    load(tmp_path / "x.safetensors", into=into)
    assert torch.equal(into["w"], weight)
    assert torch.equal(into["t"], state["t"])
