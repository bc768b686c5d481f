"""Function: users' own operations, in PyTorch's form."""

from .. import engine
from ..engine import Op, modes, wrap


class Function:
    """Subclass with static methods forward(ctx, *args) and backward(ctx, *gradients), call through `.apply(*args)`.

    forward gets the arguments as they are (Tensors among them) with recording off and returns a Tensor or a tuple.
    backward gets a gradient Tensor per output and returns one per argument of forward (None for what has none); under
    create_graph it is recorded, so that it can be differentiated again. ctx offers save_for_backward(*tensors),
    saved_tensors, needs_input_grad, mark_non_differentiable(*outputs) and any attribute of your own."""

    @staticmethod
    def forward(ctx, *args):
        raise TypeError("a Function must define forward(ctx, *args)")

    @staticmethod
    def backward(ctx, *gradients):
        raise TypeError("this Function defines no backward(ctx, *gradients)")

    @classmethod
    def apply(cls, *args):
        places = [i for i, a in enumerate(args) if isinstance(a, engine.TensorBase)]
        if not places:
            raise TypeError(f"{cls.__name__}.apply: expected at least one Tensor")
        return engine.apply(_node_class(cls), *(args[i] for i in places), args=args, places=places)


def _node_class(function):
    """The Op that runs a Function; made once per Function."""
    if "_op" not in function.__dict__:
        function._op = type(function.__name__, (_UserOp,), {"function": function, "name": function.__name__})
    return function._op


class _UserOp(Op):
    function = None

    def forward(ctx, *arrays, args, places):
        ctx.places, ctx.count = places, len(args)
        ctx.context = context = Context()
        needs = ctx.needs if ctx.recording else [False] * len(places)
        context.needs_input_grad = tuple(i in places and needs[places.index(i)] for i in range(len(args)))
        before, modes.grad = modes.grad, False
        try:
            out = ctx.function.forward(context, *args)
        finally:
            modes.grad = before
        several = isinstance(out, tuple | list)
        ctx.save(*(t.array for t in context._to_save))
        context._to_save = ()
        ctx.silent = [any(t is m for m in context._silent) for t in (out if several else [out])]
        given = [a.array for a in args if isinstance(a, engine.TensorBase)]
        arrays = [t.array.view() if any(t.array is g for g in given) else t.array for t in (out if several else [out])]
        return tuple(arrays) if several else arrays[0]

    def backward(ctx, *gradients):
        ctx.context.saved_tensors = tuple(ctx.saved)
        if len(ctx.silent) > 1 or ctx.silent[0]:
            gradients = [
                wrap(ctx.xp.zeros(*ctx._outputs[i]), ctx.device) if g is None else g for i, g in enumerate(gradients)
            ]
        result = ctx.function.backward(ctx.context, *gradients)
        ctx.context.saved_tensors = ()
        result = result if isinstance(result, tuple) else (result,)
        if len(result) != ctx.count:
            raise RuntimeError(
                f"{ctx.name}.backward returned {len(result)} gradients for {ctx.count} arguments of forward"
            )
        return tuple(result[i] for i in ctx.places)


class Context:
    """What forward hands to backward."""

    saved_tensors = ()
    needs_input_grad = ()
    _to_save = ()
    _silent = ()

    def save_for_backward(self, *tensors):
        """Keep inputs, outputs or intermediates; read them from `saved_tensors` in backward."""
        self._to_save = tensors

    def mark_non_differentiable(self, *outputs):
        """These outputs get no gradient."""
        self._silent = outputs
