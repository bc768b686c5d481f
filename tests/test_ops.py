"""Every operation, checked from its row of `op_cases.py`: gradients of first and second order against differences,
parity with PyTorch, inputs left alone, strides, zero-size, dtypes, in-place safety, leaks."""

from __future__ import annotations

import gc
import weakref
from functools import wraps

import numpy as np
import pytest
from op_cases import BAD_CALLS, CASES
from op_samples import NN

import tensorgrad as tg

try:
    import torch
except ImportError:
    torch = None

TOLERANCE = {"float64": 1e-7, "float32": 1e-5}  # relative and absolute
needs_torch = pytest.mark.skipif(torch is None, reason="PyTorch, the oracle, is not installed")


# --- how a sample is run ----------------------------------------------------------------------------------------------


def inputs_of(lib, sample, dtype="float64", grad=True):
    """The sample's inputs as fresh tensors of `lib`; floats require a gradient."""
    pairs = zip(sample.arrays(dtype), sample.inputs, strict=True)
    return [lib.tensor(a, requires_grad=grad and i.grad and a.dtype.kind == "f") for a, i in pairs]


def flat(lib, result):
    """The tensors (and Python scalars) of a result, in order."""
    if isinstance(result, tuple | list):
        return [leaf for part in result for leaf in flat(lib, part)]
    return [result]


def differentiable(lib, outs):
    return [o for o in outs if isinstance(o, lib.Tensor) and o.requires_grad]


def array(tensor):
    return tensor.detach().numpy()


def gradients(lib, inputs, outs):
    """Gradients (arrays; zeros where there is none) of the inputs for a random cotangent, the same in every library."""
    rng = np.random.default_rng(1)
    outs = differentiable(lib, outs)
    cotangents = [lib.tensor(rng.uniform(-1, 1, o.shape).astype(array(o).dtype)) for o in outs]
    wanted = [x for x in inputs if x.requires_grad]
    found = lib.autograd.grad(outs, wanted, cotangents, allow_unused=True) if outs and wanted else [None] * len(wanted)
    return [np.zeros_like(array(x)) if g is None else array(g) for x, g in zip(wanted, found, strict=True)]


def as_function(case, sample):
    """(fn, inputs) for gradcheck: `fn` maps the inputs that require a gradient to the outputs that have one."""
    inputs = inputs_of(tg, sample)
    wanted = [x for x in inputs if x.requires_grad]

    def fn(*given):
        given = iter(given)
        outs = flat(tg, case.call(tg, sample, [next(given) if x.requires_grad else x for x in inputs]))
        return tuple(differentiable(tg, outs))

    return fn, wanted


def each_sample(check):
    """Make `check(case, sample)` a test per row that reports every sample that fails."""

    @pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
    @wraps(check)
    def test(case):
        failures = []
        for number, sample in enumerate(case.samples):
            try:
                check(case, sample)
            except Exception as error:
                failures.append(f"sample {number}: {type(error).__name__}: {error}")
        assert not failures, f"{case.name}: {len(failures)} of {len(case.samples)} samples:\n" + "\n".join(failures)

    del test.__wrapped__  # or pytest would read the signature of `check`
    return test


# --- gradients --------------------------------------------------------------------------------------------------------


def checkable(case, sample):
    """(fn, inputs) where finite differences in float64 make sense, else None."""
    if not (case.grad and sample.smooth):
        return None
    fn, inputs = as_function(case, sample)
    outs = fn(*inputs)
    small = [*inputs, *outs]
    return (fn, inputs) if outs and all(t.dtype == tg.float64 and t.numel() for t in small) else None


@each_sample
def test_gradient(case, sample):
    if found := checkable(case, sample):
        assert tg.autograd.gradcheck(*found)


@each_sample
def test_second_gradient(case, sample):
    if found := checkable(case, sample):
        assert tg.autograd.gradgradcheck(*found)


@pytest.mark.parametrize("case", [c for c in CASES if c.grad], ids=lambda case: case.name)
def test_gradient_is_attached(case):
    """Each input that should have a gradient gets one in some sample: none is left out silently."""
    reached = set()
    for sample in case.samples:
        inputs = inputs_of(tg, sample)
        outs = differentiable(tg, flat(tg, case.call(tg, sample, inputs)))
        wanted = {n: x for n, x in enumerate(inputs) if x.requires_grad}
        if outs and wanted:
            ones = [tg.ones_like(o) for o in outs]
            found = tg.autograd.grad(outs, list(wanted.values()), ones, allow_unused=True)
            reached |= {n for n, g in zip(wanted, found, strict=True) if g is not None}
    assert reached == {n for s in case.samples for n, i in enumerate(s.inputs) if i.grad and i.kind == "float"}


@each_sample
def test_gradient_keeps_dtype_and_shape(case, sample):
    for dtype in ("float32", "float64"):
        inputs = inputs_of(tg, sample, dtype)
        outs = differentiable(tg, flat(tg, case.call(tg, sample, inputs)))
        wanted = [x for x in inputs if x.requires_grad]
        if outs and wanted:
            found = tg.autograd.grad(outs, wanted, [tg.ones_like(o) for o in outs], allow_unused=True)
            for x, g in zip(wanted, found, strict=True):
                assert g is None or (g.dtype, g.shape) == (x.dtype, x.shape), f"{g.dtype} {g.shape}"


# --- parity with PyTorch ----------------------------------------------------------------------------------------------


def close(ours, theirs, dtype):
    np.testing.assert_allclose(ours, theirs, rtol=TOLERANCE[dtype], atol=TOLERANCE[dtype])


def compare(case, ours, theirs, dtype):
    """Same structure, kinds, shapes, dtypes, and (unless random) values."""
    assert len(ours) == len(theirs), f"{len(ours)} results, PyTorch gives {len(theirs)}"
    for a, b in zip(ours, theirs, strict=True):
        if not isinstance(b, torch.Tensor):
            assert type(a) is type(b) and a == b, f"{a!r}, PyTorch gives {b!r}"
            continue
        assert tuple(a.shape) == tuple(b.shape), f"shape {tuple(a.shape)}, PyTorch gives {tuple(b.shape)}"
        assert f"torch.{a.dtype}" == str(b.dtype), f"dtype {a.dtype}, PyTorch gives {b.dtype}"
        assert a.requires_grad == (b.requires_grad and case.grad), f"requires_grad {a.requires_grad}"
        if not case.random:
            close(array(a), array(b), dtype)


@needs_torch
@pytest.mark.filterwarnings("ignore::UserWarning")
@each_sample
def test_parity(case, sample):
    for dtype in TOLERANCE:
        results = []
        for lib in (tg, torch):
            inputs = inputs_of(lib, sample, dtype)
            outs = flat(lib, case.call(lib, sample, inputs))
            results.append((outs, gradients(lib, inputs, outs) if case.grad else []))
        (ours, our_gradients), (theirs, their_gradients) = results
        compare(case, ours, theirs, dtype)
        if not case.random:
            for a, b in zip(our_gradients, their_gradients, strict=True):
                assert (a.shape, a.dtype) == (b.shape, b.dtype)
                close(a, b, dtype)


@needs_torch
@pytest.mark.parametrize("case", [c for c in CASES if not c.name.startswith(NN)], ids=lambda case: case.name)
def test_function_and_method_as_in_pytorch(case):
    """What PyTorch offers as function, method or both, tensorgrad offers too."""
    for theirs, ours in ((torch, tg), (torch.Tensor, tg.Tensor)):
        if callable(getattr(theirs, case.operation, None)):
            assert callable(getattr(ours, case.operation, None)), f"missing in {ours.__name__}"


@pytest.mark.parametrize("name, call", BAD_CALLS, ids=[f"{n}-{name}" for n, (name, _) in enumerate(BAD_CALLS)])
def test_bad_call(name, call):
    """Bad input gives an error of one line that names the operation, where PyTorch fails too."""
    errors = (RuntimeError, ValueError, IndexError, TypeError)
    if torch is not None:
        with pytest.raises(errors):
            call(torch)
    with pytest.raises(errors) as caught:
        call(tg)
    message = str(caught.value)
    assert name in message and "\n" not in message and len(message) < 400


# --- inputs and outputs -----------------------------------------------------------------------------------------------


@each_sample
def test_inputs_are_not_changed(case, sample):
    inputs = inputs_of(tg, sample)
    outs = flat(tg, case.call(tg, sample, inputs))
    gradients(tg, inputs, outs)
    for x, before in zip(inputs, sample.arrays(), strict=True):
        np.testing.assert_array_equal(array(x), before)


@each_sample
def test_shares_memory_only_if_a_view(case, sample):
    inputs = inputs_of(tg, sample)
    outs = [o for o in flat(tg, case.call(tg, sample, inputs)) if isinstance(o, tg.Tensor) and o.numel()]
    for x in inputs[:1] if case.view else inputs:
        if x.numel() and case.view is not None:
            assert all(np.shares_memory(array(x), array(o)) == case.view for o in outs)


def strided(values):
    """The same values with every dimension spread out and in reversed memory order."""
    spread = np.full([2 * n + 1 for n in reversed(values.shape)], 7, values.dtype)
    view = spread[(..., *(slice(1, None, 2),) * values.ndim)].T
    view[...] = values
    return view


@each_sample
def test_strided_inputs(case, sample):
    if not case.strided:
        return
    results = []
    for change in (np.array, strided):
        inputs = [tg.from_numpy(change(a)) for a in sample.arrays()]
        for x, i in zip(inputs, sample.inputs, strict=True):
            x.requires_grad_(i.grad and x.is_floating_point())
        outs = flat(tg, case.call(tg, sample, inputs))
        results.append([*(array(o) if isinstance(o, tg.Tensor) else o for o in outs), *gradients(tg, inputs, outs)])
    for a, b in zip(*results, strict=True):
        np.testing.assert_allclose(b, a, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_zero_size(case):
    """Some sample has a zero-size input or output; its gradients are zero-size too, or exist."""
    seen = False
    for sample in case.samples:
        inputs = inputs_of(tg, sample)
        outs = flat(tg, case.call(tg, sample, inputs))
        if any(isinstance(t, tg.Tensor) and t.numel() == 0 for t in [*inputs, *outs]):
            seen = True
            wanted = [x for x in inputs if x.requires_grad]
            assert [g.shape for g in gradients(tg, inputs, outs)] == [x.shape for x in wanted]
    assert seen, "no sample has a zero-size input or output"


@each_sample
def test_fused_equals_composed(case, sample):
    """A fused operation and the Tensor operations that define it give the same values and gradients."""
    if case.random:  # the mask comes from another place of the stream
        return
    results = []
    with pytest.MonkeyPatch.context() as patch:
        for level in ("fast", "composed"):
            patch.setattr("tensorgrad.ops.nn.LEVEL", level)
            inputs = inputs_of(tg, sample)
            outs = flat(tg, case.call(tg, sample, inputs))
            results.append([*(array(o) if isinstance(o, tg.Tensor) else o for o in outs), *gradients(tg, inputs, outs)])
    for a, b in zip(*results, strict=True):
        np.testing.assert_allclose(b, a, rtol=1e-12, atol=1e-12)


# --- memory and safety ------------------------------------------------------------------------------------------------


def garbage_of(run):
    """What of tensorgrad only the cyclic garbage collector could free after `run()`."""
    gc.disable()
    gc.freeze()  # look only at what `run` makes
    try:
        run()
        gc.set_debug(gc.DEBUG_SAVEALL)
        gc.collect()
        return sorted({type(o).__name__ for o in gc.garbage if type(o).__module__.startswith("tensorgrad")})
    finally:
        gc.set_debug(0)
        gc.garbage.clear()
        gc.unfreeze()
        gc.enable()


@each_sample
def test_no_leak(case, sample):
    """Graph, tensors and arrays die with the last reference, without the cyclic collector: after backward, and also
    when backward never runs."""
    alive = []

    def run():
        for backward in (False, True):
            inputs = inputs_of(tg, sample)
            arrays = [weakref.ref(x.array) for x in inputs]
            outs = flat(tg, case.call(tg, sample, inputs))
            if backward:
                gradients(tg, inputs, outs)
            del inputs, outs
            alive.extend(ref for ref in arrays if ref() is not None)

    garbage = garbage_of(run)
    assert not alive and not garbage, f"{len(alive)} input arrays still alive, garbage: {garbage}"


def test_garbage_is_found():
    def run():
        x = tg.ones(2)
        x.itself = [x]

    assert garbage_of(run) == ["Tensor"]


def changed(values):
    """Other values of the same kind."""
    return ~values if values.dtype == bool else np.roll(values, 1) * (3 if values.dtype.kind == "f" else 1)


def wrong_after_write(call, leaves, which):
    """Run `call` on copies of `leaves`, overwrite copy number `which` (or the results, if None) in place, run backward.
    Returns None where that raises an error about it or the gradients are still right; else the wrong gradients."""
    right = gradients(tg, leaves, call([x.clone() for x in leaves]))
    copies = [x.clone() for x in leaves]
    outs = call(copies)
    targets = [o for o in outs if isinstance(o, tg.Tensor)] if which is None else [copies[which]]
    for target in targets:
        with tg.no_grad():
            try:
                target[...] = tg.tensor(changed(array(target)))
            except RuntimeError:  # refused at once, as for an expanded tensor
                return None
    try:
        found = gradients(tg, leaves, outs)
    except RuntimeError as error:
        assert "in-place" in str(error) or "inplace" in str(error), f"unclear message: {error}"
        return None
    same = all(np.allclose(a, b, rtol=1e-9, atol=1e-12, equal_nan=True) for a, b in zip(found, right, strict=True))
    return None if same else found


@each_sample
def test_write_before_backward(case, sample):
    """A value changed in place after use: gradients are still right, or backward says so; never silently wrong."""
    if not case.grad:
        return
    leaves = inputs_of(tg, sample)
    for which in [None, *range(len(leaves))]:
        wrong = wrong_after_write(lambda xs: flat(tg, case.call(tg, sample, xs)), leaves, which)
        assert wrong is None, f"silently wrong after {'the result' if which is None else f'input {which}'} changed"


def test_silent_write_is_found():
    class Square(tg.autograd.Function):
        """Keeps its input behind the engine's back."""

        @staticmethod
        def forward(ctx, x):
            ctx.kept = x
            return x * x

        @staticmethod
        def backward(ctx, g):
            return 2 * ctx.kept * g

    leaves = [tg.tensor([1.0, 2.0, 3.0], dtype=tg.float64, requires_grad=True)]
    assert wrong_after_write(lambda xs: [Square.apply(*xs)], leaves, 0) is not None
    assert wrong_after_write(lambda xs: [xs[0] * xs[0]], leaves, 0) is None
