"""Products by oneDNN: the numbers of float64, whatever the order in memory, and only where they are asked for."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from luthier.model.kernels import products
from luthier.model.kernels.varlen import traced

needs_kernel = pytest.mark.skipif(not products.has_kernel(torch.float32), reason="oneDNN is not in this PyTorch")
SIDES = st.integers(min_value=1, max_value=70)


@pytest.fixture(autouse=True)
def always(monkeypatch):
    """oneDNN for every size, on any processor."""
    for name in ("MANY", "MANY_READ"):
        monkeypatch.setattr(products, name, 0)
    for name in ("is_better_here", "is_better_for_wide"):
        monkeypatch.setattr(products, name, lambda: True)


@st.composite
def matrices(draw):
    """Two matrices with the same inner side, each as it is, transposed in memory, or part of a larger one."""
    num_rows, inner, outer, seed = draw(SIDES), draw(SIDES), draw(SIDES), draw(st.integers(0, 2**31))
    generator = torch.Generator().manual_seed(seed)

    def matrix(rows, columns):
        kind = draw(st.sampled_from(["plain", "transposed", "part", "transposed part"]))
        more = 3 if "part" in kind else 0
        shape = (columns, rows) if "transposed" in kind else (rows, columns)
        whole = torch.randn(shape[0] + more, shape[1] + more, generator=generator)
        part = whole[more : more + shape[0], more : more + shape[1]]
        return part.T if "transposed" in kind else part

    return matrix(num_rows, inner), matrix(outer, inner)


@needs_kernel
@settings(max_examples=200, deadline=None)
@given(matrices())
def test_the_numbers_are_those_of_float64(pair):
    x, weight = pair
    assert products.is_faster(x, weight) == products.is_in_one_piece(weight)
    expected = x.double() @ weight.double().T
    y = torch.randn(expected.shape, generator=torch.Generator().manual_seed(0))
    columns = torch.zeros(len(x), 2 * len(weight))[:, ::2]
    products.product_into(columns, x, weight)
    for found, wanted in (
        (products.product(x, weight), expected),
        (products.added_product(y.clone(), x, weight), expected + y.double()),
        (columns, expected),
    ):
        torch.testing.assert_close(found.double(), wanted, atol=2e-5, rtol=1e-5)


@needs_kernel
def test_a_part_of_a_larger_weight_stays_with_pytorch():
    """oneDNN would take a thousand times as long."""
    x, whole = torch.randn(4, 8), torch.randn(6, 16)
    for weight in (whole[:, :8], whole[::2, :8], whole.T[:8].T, torch.randn(1, 8).expand(6, 8)):
        assert not products.is_faster(x, weight)
    for weight in (torch.randn(6, 8), torch.randn(8, 6).T, torch.randn(9, 8)[3:]):
        assert products.is_faster(x, weight)
        assert products.is_faster(whole[:4, :8], weight), "any layout of x is read as fast"


@needs_kernel
def test_other_formats_and_tensors_stay_with_pytorch():
    x, weight = torch.randn(4, 8), torch.randn(3, 8)

    class Marked(torch.Tensor):
        pass

    assert products.is_faster(x, torch.nn.Parameter(weight))
    assert not products.is_faster(x.double(), weight.double())
    assert not products.is_faster(x.bfloat16(), weight.bfloat16())
    assert not products.is_faster(x.to("meta"), weight.to("meta"))
    assert not products.is_faster(x, weight.as_subclass(Marked))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert products.product(x, weight).dtype is torch.bfloat16


def test_small_products_and_other_processors_stay_with_pytorch(monkeypatch):
    monkeypatch.undo()
    is_better = products.is_better_here()
    large, low = torch.empty(700, 576), torch.empty(8, 576)
    assert products.is_faster(large, torch.empty(576, 576)) == (is_better and products.is_better_for_wide())
    assert products.is_faster(large, low) == is_better
    assert not products.is_faster(large[:300], low)
    assert not products.is_faster(torch.empty(100, 576), torch.empty(576, 576))
    assert not products.is_faster(torch.empty(0, 576), torch.empty(576, 576))
    assert products.product(torch.empty(0, 576), torch.empty(8, 576)).shape == (0, 8)
    monkeypatch.setattr(products, "is_better_here", lambda: False)
    assert not products.is_faster(large, torch.empty(576, 576))


def test_without_avx_512_only_narrow_products_are_faster(monkeypatch):
    monkeypatch.undo()
    for name, answer in (("is_better_here", True), ("is_better_for_wide", False)):
        monkeypatch.setattr(products, name, lambda answer=answer: answer)
    large, low = torch.empty(700, 576), torch.empty(8, 576)
    assert products.is_faster(large, low) and not products.is_faster(large, torch.empty(576, 576))


@settings(max_examples=100, deadline=None)
@given(matrices(), st.sampled_from(products.HALVES), st.booleans())
def test_where_16_bits_are_slow_only_the_result_is_rounded(given_matrices, dtype, autocasts):
    """To the nearest number, whatever the order of the sum; autocast would round each of its parts."""
    x, weight = (matrix.to(dtype) for matrix in given_matrices)
    exact, bias, y = (
        x.double() @ weight.double().T,
        torch.randn(len(weight)).to(dtype),
        torch.randn(len(x), len(weight)),
    )
    out, into, sums = torch.empty(exact.shape, dtype=dtype), y.to(dtype), y.to(dtype)
    with pytest.MonkeyPatch.context() as patch, torch.autocast("cpu", torch.bfloat16, enabled=autocasts):
        patch.setattr(products, "has_half_kernel", lambda dtype: False)
        patch.setattr(products, "FEW_ROWS", 0)
        products.product_into(out, x, weight)
        found = {
            "product": (products.product(x, weight), exact),
            "with bias": (products.product(x, weight, bias), exact + bias.double()),
            "into": (out, exact),
            "added": (products.added_product(y.to(dtype), x, weight), exact + y.to(dtype).double()),
            "in place": (products.add_product(into, x, weight), exact + y.to(dtype).double()),
            "scaled": (products.add_product(sums, x, weight, 0.5), exact / 2 + y.to(dtype).double()),
            "wide weight": (products.product(x, weight.float(), bias.float()), exact + bias.double()),
        }
    assert found["in place"][0] is into
    for name, (one, expected) in found.items():
        assert one.dtype is dtype, name
        torch.testing.assert_close(one.double(), expected, rtol=torch.finfo(dtype).eps / 2, atol=2e-5, msg=name)


def test_where_16_bits_are_slow(monkeypatch):
    many, few, weight = torch.empty(16, 8), torch.empty(15, 8), torch.empty(4, 8)
    half = torch.bfloat16
    monkeypatch.setattr(products, "has_half_kernel", lambda dtype: dtype is torch.float16)
    assert products.is_slow(many, weight, half) and not products.is_slow(few, weight, half)
    assert products.is_slow(few, torch.empty(8, 4).T, half), "PyTorch reads such a weight slowly"
    assert not products.is_slow(many, weight, torch.float16) and not products.is_slow(many, weight, torch.float32)
    assert not products.is_slow(many.to("meta"), weight.to("meta"), half)

    class Marked(torch.Tensor):
        pass

    assert not products.is_slow(many, weight.as_subclass(Marked), half)
    formats = [products.format_here(many.to(dtype)) for dtype in (half, torch.float16, torch.float64)]
    assert formats == [torch.float32, torch.float16, torch.float64]
    assert products.format_here(many.to("meta", half)) is torch.float32, "a plan for this processor"
    with traced():
        assert products.format_here(many.to("meta", half)) is half, "a plan for a GPU"


def test_the_trial_of_the_library_does_not_depend_on_where_it_is_made():
    products.has_kernel.cache_clear()
    with torch.device("meta"):
        found = products.has_kernel(torch.float32)
    products.has_kernel.cache_clear()
    assert found == products.has_kernel(torch.float32)


@settings(max_examples=100, deadline=None)
@given(matrices(), st.integers(1, 2), st.booleans(), st.integers(1, 5))
def test_one_or_two_rows(given_matrices, num_rows, has_bias, num_threads):
    """Whatever the number of parts leaves over, and however the rows lie in memory."""
    x, weight = given_matrices
    x, weight = x[:num_rows], weight.contiguous()
    bias = torch.randn(len(weight)) if has_bias else None
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch, "get_num_threads", lambda: num_threads)
        product = products.for_few_rows(weight, bias)
    assert product is not None and product.are_few(x)
    before = x.clone()
    found = product(x[:, None])
    expected = torch.nn.functional.linear(x.double(), weight.double(), None if bias is None else bias.double())
    assert found.shape == (len(x), 1, len(weight)) and found.is_contiguous() and torch.equal(x, before)
    torch.testing.assert_close(found[:, 0], expected.float(), atol=1e-4, rtol=1e-4)


def test_few_rows_are_left_to_the_usual_product(monkeypatch):
    weight = torch.randn(6, 4)
    for other in (weight.bfloat16(), weight.T, weight.to("meta")):
        assert products.for_few_rows(other, None) is None
    assert not products.FewRows(weight).are_few(torch.randn(3, 4))
    monkeypatch.setattr(products, "is_better_here", lambda: False)
    assert products.for_few_rows(weight, None) is None
