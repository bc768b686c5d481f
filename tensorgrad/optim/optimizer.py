"""Optimizer: parameter groups, flat storage, state_dict in PyTorch's layout."""

from functools import partial

import numpy as np

from ..creation import as_tensor
from ..kernels.reference_update import unless
from ..modes import enable_grad
from ..nn.parameter import drop_grad, zero_grad
from ..tensor import Tensor
from .flat import FlatGroup


class Optimizer:
    """Base of all optimizers.

    `params`: Tensors, or (name, Tensor) pairs as from `named_parameters()`, or dicts {"params": ..., option: value}
    with options that differ from `defaults`. Options live in `param_groups` and may be changed between steps.
    Parameters move into flat storage: what shared their memory before (`detach()`, `state_dict()`) stays behind.

    A subclass says which state a parameter has (`_state_names`) and how a block of memory is updated (`_update`)."""

    def __init__(self, params, defaults):
        self.defaults, self.param_groups, self._flat = defaults, [], []
        if isinstance(params, Tensor):
            raise TypeError("an optimizer takes an iterable of Tensors or dicts; put the single Tensor into a list")
        params = list(params)
        if not params:
            raise ValueError("the optimizer got no parameters; is the model empty, or its generator already used up?")
        for group in params if isinstance(params[0], dict) else [{"params": params}]:
            self.add_param_group(group)

    def _state_names(self, group):
        """The names of the state arrays that the parameters of `group` have."""
        raise TypeError(f"{type(self).__name__} defines no _state_names")

    def _update(self, group, step, xp, p, grad, *state_and_scratch):
        """Update the block `p` (1-D array) in place for the `step`-th time, from `grad`, the state blocks in the order
        of `_state_names` and two scratch blocks, all of its length. `grad` must stay as it is."""
        raise TypeError(f"{type(self).__name__} defines no _update")

    def _check(self, group):
        """Raise ValueError where an option makes no sense."""
        for name in ("lr", "weight_decay", "eps", "momentum"):
            if not group.get(name, 0) >= 0:
                raise ValueError(f"{type(self).__name__}: {name} must be at least 0, not {group[name]}")
        if not all(0 <= beta < 1 for beta in group.get("betas", ())):
            raise ValueError(f"{type(self).__name__}: betas must be in [0, 1), not {group['betas']}")

    def add_param_group(self, group):
        """Add parameters with options of their own: {"params": ..., option: value}."""
        params = group["params"]
        params = [params] if isinstance(params, Tensor) else list(params)
        group = {**self.defaults, **group}
        if params and isinstance(params[0], tuple):
            group["param_names"], params = [name for name, _ in params], [p for _, p in params]
        for p in params:
            if not isinstance(p, Tensor):
                raise TypeError(f"an optimizer takes Tensors, not {type(p).__name__}")
            if not p.is_leaf:
                raise ValueError(
                    f"an optimizer cannot train the result of an operation (shape {tuple(p.shape)}); "
                    "give it leaves, such as Parameters"
                )
        together = [p for other in self.param_groups for p in other["params"]] + params
        if len(set(together)) < len(together):
            raise ValueError("the optimizer got a parameter twice; Module.parameters() yields each once")
        group["params"] = params
        self._check(group)
        self.param_groups.append(group)
        self._flat.append(FlatGroup())
        self._flat[-1].refresh(params, self._state_names(group))

    def step(self, closure=None, *, grad_scale=1.0, found_inf=None):
        """Update all parameters that have a gradient. `closure`, where given, computes the loss anew with its
        gradients and is called first; its result is returned.

        The gradients count `grad_scale` times: min(1, max_norm / (norm + 1e-6)) clips their norm, see
        `nn.utils.get_total_norm`, and saves the pass over memory that `clip_grad_norm_` takes. Whether `.grad` holds
        them scaled afterwards is not said. It may be a 0-d Tensor, of which a GPU's is not read by the host.

        `found_inf`: a 0-d Tensor; where it is not 0 the step is left out, as if `step` had not been called. A GPU's is
        not read by the host: the GPU leaves parameters and state as they are, and counts."""
        if isinstance(grad_scale, Tensor):
            grad_scale = grad_scale.item() if grad_scale.device.type == "cpu" else grad_scale.array
        loss = None
        if closure is not None:
            with enable_grad():
                loss = closure()
        if found_inf is not None:
            if found_inf.device.type == "cpu":
                return loss if found_inf.item() else self.step(grad_scale=grad_scale)
            found_inf = found_inf.array != 0
        for group, flat in zip(self.param_groups, self._flat, strict=True):
            flat.refresh(group["params"], self._state_names(group))
            for buffer in flat.buffers:
                left_out = buffer.left_out(found_inf is not None)
                for first, last, step in buffer.gather():
                    if found_inf is None:
                        self._update_run(group, buffer, first, last, step, grad_scale)
                    else:
                        self._update_run_unless(found_inf, group, buffer, first, last, step - left_out, grad_scale)
                if found_inf is not None:
                    left_out += found_inf
        return loss

    def _update_run(self, group, buffer, first, last, step, grad_scale):
        buffer.scale_gradients(first, last, grad_scale)
        for arrays in buffer.blocks(first, last):
            self._update(group, step, buffer.device.xp, *arrays)

    def _update_run_unless(self, found_inf, group, buffer, first, last, step, grad_scale):
        """The same, undone where `found_inf`, a 0-d array of the device, is set; `step` is a 0-d array too."""
        data, _, *states = buffer.run(first, last)
        update = partial(self._update_run, group, buffer, first, last, step, grad_scale)
        unless(buffer.device.xp, found_inf, (data, *states), update)
        for p in buffer.params[first:last]:
            p._bump()  # 16-bit copies that the update has made may be of what was undone

    def zero_grad(self, set_to_none=True):
        """Drop all gradients, or fill them with zeros."""
        for group, flat in zip(self.param_groups, self._flat, strict=True):
            for p in group["params"]:
                if not set_to_none:
                    zero_grad(p)
                    continue
                drop_grad(p)
                if p in flat.slots:
                    buffer, i = flat.slots[p]
                    buffer.lend(i)

    def flat_buffers(self):
        """The FlatBuffers of all groups, in an order that depends on the parameters alone: all that may have gradients
        lie in them."""
        for group, flat in zip(self.param_groups, self._flat, strict=True):
            flat.refresh(group["params"], self._state_names(group))
        return [buffer for flat in self._flat for buffer in flat.buffers]

    # ---- state ----

    def __getstate__(self):
        """For copy.deepcopy and pickle: flat storage stays behind, because views of it would not survive as views."""
        own = {name: value for name, value in self.__dict__.items() if name != "_flat"}
        return {**own, "_state": self.state_dict()["state"]}

    def __setstate__(self, own):
        state = own.pop("_state")
        self.__dict__.update(own)
        self._flat = [FlatGroup() for _ in self.param_groups]
        counted, groups = 0, []
        for group in self.param_groups:
            numbers = list(range(counted, counted + len(group["params"])))
            groups.append({**group, "params": numbers})
            counted += len(numbers)
        self.load_state_dict({"state": state, "param_groups": groups})

    @property
    def state(self):
        """parameter -> {"step": number of updates, state name: Tensor} for all parameters updated so far. The Tensors
        are views of the state in use."""
        updates = {buffer: buffer.updates() for flat in self._flat for buffer in flat.buffers}
        return {
            p: {"step": updates[buffer][i], **buffer.state_of(i)}
            for flat in self._flat
            for p, (buffer, i) in flat.slots.items()
            if updates[buffer][i] and buffer.state
        }

    def state_dict(self):
        """{"state": {number of the parameter: {"step": 0-d Tensor, name: Tensor}}, "param_groups": [{option: value,
        "params": [numbers]}]}; parameters are numbered through all groups. The Tensors are views of the state."""
        numbers = {p: i for i, p in enumerate(p for group in self.param_groups for p in group["params"])}
        state = {numbers[p]: {**entry, "step": as_tensor(np.float32(entry["step"]))} for p, entry in self.state.items()}
        groups = [{**group, "params": [numbers[p] for p in group["params"]]} for group in self.param_groups]
        return {"state": dict(sorted(state.items())), "param_groups": groups}

    def load_state_dict(self, state_dict):
        """Take over what `state_dict()` returned, here or in PyTorch (Tensors or arrays). Options are taken over too.
        Everything is checked before anything is changed; raises ValueError with all that does not fit."""
        saved = state_dict["param_groups"]
        sizes, own = [len(g["params"]) for g in saved], [len(g["params"]) for g in self.param_groups]
        if sizes != own:
            raise ValueError(f"optimizer state has parameter groups of sizes {sizes}, this optimizer {own}")
        groups, entries, problems = [], [], []
        for theirs, ours in zip(saved, self.param_groups, strict=True):
            group = {**ours, **theirs, "params": ours["params"]}
            for option in ("amsgrad", "maximize"):
                if group.get(option):
                    problems.append(f"{option}=True is not supported")
            self._check(group)
            groups.append(group)
            entries.append({})
            for number, p in zip(theirs["params"], ours["params"], strict=True):
                entry = state_dict["state"].get(number)
                if not entry:
                    continue
                entries[-1][p] = entry
                for name in self._state_names(group):
                    if entry.get(name) is None:
                        problems.append(f"{name} of parameter {number} is missing")
                    elif tuple(entry[name].shape) != tuple(p.shape):
                        problems.append(
                            f"{name} of parameter {number} has shape {tuple(entry[name].shape)}, "
                            f"the parameter {tuple(p.shape)}"
                        )
        if problems:
            raise ValueError("optimizer state does not fit; nothing was loaded: " + "; ".join(problems))
        for mine, group, flat, given in zip(self.param_groups, groups, self._flat, entries, strict=True):
            mine.update(group)
            flat.refresh(group["params"], self._state_names(group), required=given)
            for buffer in flat.buffers:
                buffer.settle()
            for p, (buffer, i) in flat.slots.items():
                entry = given.get(p, {})
                buffer.steps[i] = int(entry.get("step", 1)) if entry else 0  # PyTorch's SGD and Muon keep no count
                for name, target in buffer.state_of(i).items():
                    if entry:
                        target.copy_(as_tensor(entry[name]))
                    else:
                        target.zero_()

    def __repr__(self):
        lines = [f"{type(self).__name__} ("]
        for i, group in enumerate(self.param_groups):
            lines += [f"Parameter Group {i}"] + [f"    {key}: {group[key]}" for key in sorted(group) if key != "params"]
        return "\n".join([*lines, ")"])
