"""Small matrix products inside compiled kernels, where a call of BLAS costs as much as the product: attention's.

`tile` computes four rows by WIDTH columns of A @ B with the sums in registers. A is read number by number wherever it
lies, transposed or not; B lies in panels of WIDTH columns, (k, WIDTH) each, which `pack` and `pack_transposed` make.
"""

import llvmlite.binding
from llvmlite import ir
from numba import carray, types
from numba.extending import intrinsic

from .compiled_math import F32, njit_fast, pointer

ROWS = 4
# eight registers of sums keep two units busy that take four cycles each: two registers per row
WIDTH = 32 if llvmlite.binding.get_host_cpu_features().get("avx512f") else 16


@intrinsic
def tile(typingctx, k, a0, a1, a2, a3, step, b, c0, c1, c2, c3, scale, add):
    """c[r][:WIDTH] = scale * sum over p < k of a[r][p * step] * b[p * WIDTH : (p + 1) * WIDTH], for four rows r; added
    to what is there if `add`. a, b, c: addresses; step: in bytes; scale: float32."""

    def codegen(context, builder, signature, args):
        k, a0, a1, a2, a3, step, b, c0, c1, c2, c3, scale, add = args
        real, word, lane = ir.FloatType(), k.type, ir.IntType(32)
        vector = ir.VectorType(real, WIDTH)
        zero, undefined = ir.Constant(vector, [0.0] * WIDTH), ir.Constant(vector, ir.Undefined)
        everywhere = ir.Constant(ir.VectorType(lane, WIDTH), [0] * WIDTH)

        def splat(number):
            return builder.shuffle_vector(builder.insert_element(undefined, number, lane(0)), undefined, everywhere)

        def multiply_add(x, y, total):  # one instruction, where the processor has it
            return builder.fadd(total, builder.fmul(x, y, flags=("contract",)), flags=("contract",))

        def phis(kind, count):
            return [builder.phi(kind) for _ in range(count)]

        def load(address, kind):
            return builder.load(builder.inttoptr(address, kind.as_pointer()), align=4)

        before, loop, after = builder.block, builder.append_basic_block("terms"), builder.append_basic_block("store")
        builder.cbranch(builder.icmp_signed(">", k, word(0)), loop, after)

        builder.position_at_end(loop)
        (p, place, panel), sums = phis(word, 3), phis(vector, ROWS)
        columns = load(panel, vector)
        more = [multiply_add(splat(load(builder.add(row, place), real)), columns, total)
                for row, total in zip((a0, a1, a2, a3), sums, strict=True)]
        steps = builder.add(p, word(1)), builder.add(place, step), builder.add(panel, word(4 * WIDTH))
        for phi, first, following in zip((p, place, panel, *sums), (word(0), word(0), b, *[zero] * ROWS),
                                         (*steps, *more), strict=True):
            phi.add_incoming(first, before)
            phi.add_incoming(following, loop)
        builder.cbranch(builder.icmp_signed("<", steps[0], k), loop, after)

        builder.position_at_end(after)
        totals, scales = phis(vector, ROWS), splat(scale)
        for total, last, address in zip(totals, more, (c0, c1, c2, c3), strict=True):
            total.add_incoming(zero, before)
            total.add_incoming(last, loop)
            old = builder.select(add, load(address, vector), zero)
            builder.store(multiply_add(total, scales, old), builder.inttoptr(address, vector.as_pointer()), align=4)
        return context.get_dummy_value()

    word = types.intp
    return types.void(*[word] * 11, types.float32, types.boolean), codegen


@njit_fast
def pack(source, step, k, columns, panels):
    """The matrix (k, columns) at the address `source`, rows `step` bytes apart, as panels; zeros fill the last one."""
    for first in range(0, columns, WIDTH):
        n = min(WIDTH, columns - first)
        for p in range(k):
            row = carray(pointer(source + p * step + 4 * first), WIDTH)
            place = panels[first * k + p * WIDTH : first * k + (p + 1) * WIDTH]
            if n == WIDTH:
                for j in range(WIDTH):
                    place[j] = row[j]
            else:
                for j in range(WIDTH):
                    place[j] = row[j] if j < n else F32(0)


@njit_fast
def pack_transposed(source, step, columns, k, panels):
    """The transpose of the matrix (columns, k) at the address `source`, rows `step` bytes apart, as panels."""
    for first in range(0, columns, WIDTH):
        n = min(WIDTH, columns - first)
        place = panels[first * k : (first + WIDTH) * k]
        for j in range(WIDTH):
            row = carray(pointer(source + (first + min(j, n - 1)) * step), k)
            for p in range(k):
                place[p * WIDTH + j] = row[p] if j < n else F32(0)


@njit_fast
def room(columns, k):
    """Elements of the panels of a matrix (k, columns)."""
    return (columns + WIDTH - 1) // WIDTH * WIDTH * k
