"""Function: users' own operations, in PyTorch's form."""

from .. import engine
from ..engine import Op, modes, wrap


class Function:
    """Subclass with static methods forward(ctx, *args) and backward(ctx, *gradients), call through `.apply(*args)`.

    forward gets the arguments as they are (Tensors among them) with recording off and returns a Tensor or a tuple.
    backward gets a gradient Tensor per output and returns one per argument of forward (None for what has none); under
    create_graph it is recorded, so that it can be differentiated again. ctx offers save_for_backward(*tensors),
    saved_tensors, needs_input_grad, mark_non_differentiable(*outputs) and any attribute of your own. Outputs that are
    no floating-point Tensors get no gradient anyway. With setup_context(ctx, inputs, output), forward takes no ctx."""

    @staticmethod
    def forward(ctx, *args):
        raise TypeError("a Function must define forward(ctx, *args)")

    setup_context = None

    @staticmethod
    def backward(ctx, *gradients):
        raise TypeError("this Function defines no backward(ctx, *gradients)")

    @classmethod
    def apply(cls, *args):
        places = [i for i, a in enumerate(args) if isinstance(a, engine.TensorBase)]
        if not places:
            raise TypeError(f"{cls.__name__}.apply: expected at least one Tensor")
        context = Context()
        out = engine.apply(_node_class(cls), *(args[i] for i in places), args=args, places=places, context=context)
        tensors = iter(out if isinstance(out, tuple) else (out,))
        outputs = [next(tensors) if value is _TENSOR else value for value in context._outputs]
        for i in context._silent:
            if isinstance(outputs[i], engine.TensorBase):
                outputs[i].node = None
        return tuple(outputs) if context._several else outputs[0]


def _node_class(function):
    """The Op that runs a Function; made once per Function."""
    if "_op" not in function.__dict__:
        function._op = type(function.__name__, (_UserOp,), {"function": function, "name": function.__name__})
    return function._op


_TENSOR = object()  # stands for a Tensor among the outputs


class _UserOp(Op):
    function = None

    def forward(ctx, *arrays, args, places, context):
        ctx.places, ctx.count, ctx.context = places, len(args), context
        needs = ctx.needs if ctx.recording else [False] * len(places)
        context.needs_input_grad = tuple(i in places and needs[places.index(i)] for i in range(len(args)))
        before, modes.grad = modes.grad, False
        try:
            if ctx.function.setup_context is None:
                out = ctx.function.forward(context, *args)
            else:
                out = ctx.function.forward(*args)
                ctx.function.setup_context(context, args, out)
        finally:
            modes.grad = before
        context._several = isinstance(out, tuple | list)
        outputs = out if context._several else [out]
        tensors = [t for t in outputs if isinstance(t, engine.TensorBase)]
        if not tensors:
            raise TypeError(f"forward returned no Tensor, but {type(out).__name__}")
        marked = context._silent
        context._silent = [
            i
            for i, t in enumerate(outputs)
            if not isinstance(t, engine.TensorBase) or any(t is m for m in marked) or not t.is_floating_point()
        ]
        context._outputs = [_TENSOR if isinstance(t, engine.TensorBase) else t for t in outputs]
        ctx.save(*(None if t is None else t.array for t in context._to_save))
        context._to_save = ()
        given = [a.array for a in args if isinstance(a, engine.TensorBase)]
        arrays = [t.array.view() if any(t.array is g for g in given) else t.array for t in tensors]
        return tuple(arrays) if context._several else arrays[0]

    def backward(ctx, *gradients):
        ctx.context.saved_tensors = tuple(ctx.saved)
        if ctx._outputs is not None:
            gradients = [
                wrap(ctx.xp.zeros(*ctx._outputs[i]), ctx.device) if g is None else g for i, g in enumerate(gradients)
            ]
        tensors = iter(gradients)
        given = [next(tensors) if value is _TENSOR else None for value in ctx.context._outputs]
        result = ctx.function.backward(ctx.context, *given)
        ctx.context.saved_tensors = ()
        result = result if isinstance(result, tuple) else (result,)
        while len(result) > ctx.count and result[-1] is None:
            result = result[:-1]  # PyTorch lets surplus None pass
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
    _silent = ()  # the outputs marked; after forward the numbers of all outputs without gradient
    _outputs = ()  # what forward returned, with _TENSOR for Tensors
    _several = False  # did it return a tuple?

    def save_for_backward(self, *tensors):
        """Keep inputs, outputs or intermediates; read them from `saved_tensors` in backward."""
        self._to_save = tensors

    def mark_non_differentiable(self, *outputs):
        """These outputs get no gradient."""
        self._silent = outputs
