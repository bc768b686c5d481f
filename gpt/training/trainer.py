"""The training loop: step, evaluate, and tell the callbacks."""
import math
import os
import signal
import threading
import time
from contextlib import contextmanager

import tensorgrad as tg
from tensorgrad.nn.utils import clip_grad_norm_, get_total_norm

from ..errors import UserError
from ..text import IGNORE_INDEX, check_length
from ..text.finetune import Examples
from .evaluation import evaluate, training_batches, validation_batches
from .optimizers import make_optimizer, make_schedule
from .precision import arithmetic


class Interrupted(KeyboardInterrupt):
    """Training was interrupted, and ended in order: the step was finished and the callbacks have saved."""


class _Abandoned(BaseException):
    """Raised by Ctrl-C in the middle of what need not be finished: an evaluation or a sample."""


class Trainer:
    """Trains `model` on `dataset` as a TrainConfig says.

        trainer = Trainer(model, config, dataset, callbacks=[MetricsFile("out/metrics.jsonl")])
        trainer.fit()

    dataset: has `train` and `val`, 1-D arrays of token ids or Examples, and a `tokenizer`. The model is moved to
    `config.device`.

    A run is a function of config, data and seed. The batches, the evaluations and the samples draw their random numbers
    independently of each other, and `state_dict()` holds everything else, so a resumed run repeats the bits of an
    uninterrupted one.

    Of several processes (`mpiexec -n N`) each takes every N-th of a step's batches, so that a step is what one process
    makes of the same settings, but for rounding and for dropout, whose masks each process draws for itself. Callbacks
    are called in the first process.
    """

    def __init__(self, model, config, dataset, callbacks=()):
        if not isinstance(dataset.val, Examples):
            check_length(dataset.val, config.window if config.eval_iters else 1, "validation")
        self.world = tg.distributed.world()
        if config.gradient_accumulation_steps % self.world.size:
            raise UserError(f"gradient_accumulation_steps = {config.gradient_accumulation_steps} cannot be shared out "
                            f"among {self.world.size} processes: make it a multiple of {self.world.size}, and "
                            "batch_size smaller for as many tokens per step")
        if config.cuda_graph and (self.world.size > 1 or isinstance(dataset.train, Examples)):
            raise UserError("cuda_graph is for one process, and for batches of one length, which examples are not; "
                            "leave cuda_graph out")
        self.model, self.config, self.dataset = model.to(config.device), config, dataset
        model.activation_checkpointing = config.activation_checkpointing
        self.callbacks = list(callbacks)
        self.optimizer = make_optimizer(model, config)
        self.schedule = make_schedule(config)
        self.batches = training_batches(dataset.train, config.window, config.batch_size, config.seed)
        self.token_bytes = dataset.tokenizer.token_bytes()
        self.iteration = 0                # optimizer steps done
        self.evaluated_at = None          # iteration of the latest evaluation
        self.best_val_loss = None
        self.best_iteration = None
        self.evaluations_since_best = 0
        self.saved_at = None              # iteration of the latest checkpoint, for the message when training fails
        self.stop_reason = None
        self.scaler = tg.amp.GradScaler(enabled=config.dtype == "float16")
        self._runs_ahead = tg.device(config.device).type != "cpu"  # the host queues steps without waiting for results
        self._prefetch = tg.cuda.Prefetcher(config.device) if self._runs_ahead else None
        self._ahead = None                # the next step's batches, on the device already, and the state before them
        self._graph = None                # a whole step as a CUDA graph; recorded before it is first launched
        self._unread = []                 # (record, loss, norm) of the steps whose results were not read yet
        self._read_at = None              # when results were read last, on the host's clock
        self._step_tokens = 0             # that the latest step went over
        self._interrupted = False
        self._may_interrupt = False

    # ---- the loop ----

    def fit(self):
        """Train until `config.max_iters`, a callback's `stop()`, or an interruption.

        Raises UserError when the loss is no longer finite, and Interrupted after Ctrl-C or SIGTERM, when the step at
        hand is finished and the callbacks have saved. A second Ctrl-C does not wait for that: KeyboardInterrupt.
        """
        self.model.train()
        self.world.split_random(self.config.device)
        for p in self.model.parameters():
            if p.requires_grad:
                self.world.broadcast_(p)  # equal already, unless the machines differ
        with self._signals():
            try:
                self.emit("on_start")
                self._loop()
                self.emit("on_stop")
            finally:
                self.emit("on_close")
        if self._interrupted:
            raise Interrupted(f"interrupted at iteration {self.iteration}")

    def _loop(self):
        try:
            while not self._finished():
                self._train_step()
            self._report()
        except _Abandoned:
            pass
        if self._interrupted:
            self.event("interrupt", f"interrupted at iteration {self.iteration}")

    def _finished(self):
        """Evaluate where it is due; whether there is no further step to do."""
        last = self.iteration >= self.config.max_iters
        if last or self.iteration % self.config.eval_interval == 0:
            self._report()  # a loss that is not finite must be found before anything is saved
        if (last or self.iteration % self.config.eval_interval == 0) and self.evaluated_at != self.iteration:
            self.evaluate()
        interrupted, stopped = self.world.any(self._interrupted, self.stop_reason is not None)
        if interrupted:
            self._interrupted = True  # on whichever process it was
        return last or interrupted or stopped

    def stop(self, reason):
        """End the training before its next step; for callbacks."""
        self.stop_reason = reason
        self.event("stop", reason)

    def _train_step(self):
        start = time.perf_counter()
        lr = self.schedule(self.iteration)
        for group in self.optimizer.param_groups:
            group["lr"] = lr
        self._read_at = self._read_at or start
        (self._launch if self.config.cuda_graph else self._compute)({"iter": self.iteration, "lr": lr})
        self.iteration += 1
        due = (self.config.log_interval, self.config.sample_interval or math.inf)
        if not self._runs_ahead or any((self.iteration - 1) % n == 0 or self.iteration % n == 0 for n in due):
            self._report()
        else:
            self._ahead = self._load()  # while the GPU computes

    def _compute(self, record):
        """Make a step, and keep its loss and gradient norm with `record`, to be read later."""
        loss = self.world.all_reduce_(self._accumulate_gradients())
        self.world.all_reduce_gradients_(self.optimizer)
        if self.scaler.is_enabled():
            self.scaler.unscale_(self.optimizer)
        norm = self.world.broadcast_(get_total_norm(self._gradients()))  # one number of threads may sum up otherwise
        self._unread.append((record, loss, norm, self._step_tokens))
        if not self._runs_ahead:
            self._read(self._unread[-1])  # before the weights are touched
        if self.scaler.is_enabled():
            self.scaler.step(self.optimizer, wait=not self._runs_ahead, grad_scale=self._clipping(norm))
            self.scaler.update()
        else:
            self.optimizer.step(grad_scale=self._clipping(norm))
        self.optimizer.zero_grad()

    def _launch(self, record):
        """The same as a CUDA graph."""
        batches, parts = self._next()
        ids = [tensor for pair in batches for tensor in pair]

        def gradients(*ids):
            loss, clip = self._add_up(list(zip(ids[::2], ids[1::2], strict=True)), parts), self.config.grad_clip
            return loss, clip_grad_norm_(self.model.parameters(), clip) if clip else get_total_norm(self._gradients())

        if self._graph is None:
            self._graph = tg.cuda.graphed_step(gradients, self.optimizer, *ids)
        loss, norm = (t.clone() for t in self._graph(*ids))  # the next step writes over them
        self._unread.append((record, loss, norm, self._step_tokens))

    def _gradients(self):
        return [p.grad for p in self.model.parameters() if p.grad is not None]

    def _clipping(self, norm):
        """What the gradients have to be multiplied by; on a GPU a tensor, for which nobody waits."""
        clip = self.config.grad_clip
        if not clip:
            return 1.0
        if not self._runs_ahead:
            return min(1.0, clip / (norm.item() + 1e-6))
        return (clip / (norm + 1e-6)).clamp(max=1.0)

    def _report(self):
        """Read the results of the steps since the last report, which waits for the device, and tell the callbacks."""
        if not self._unread:
            return
        unread, self._unread = self._unread, []
        for entry in unread:
            self._read(entry)
        tokens, now = sum(entry[3] for entry in unread), time.perf_counter()
        speed, self._read_at = tokens / (now - self._read_at), None
        for record, *_ in unread:
            self.emit("on_step", {**record, "tokens_per_s": speed})

    def _read(self, entry):
        """Put loss and gradient norm of a step into its record, once, and raise where one is not finite."""
        record, loss, norm, _ = entry
        if "loss" in record:
            return
        record.update(loss=loss.item(), lr=record.pop("lr"), grad_norm=norm.item())
        self._check_finite("the loss", record["loss"], record["lr"], record["iter"])
        if not self.scaler.is_enabled():  # which leaves such steps out, and scales less
            self._check_finite("the gradient norm", record["grad_norm"], record["lr"], record["iter"])

    def _accumulate_gradients(self):
        """Forward and backward over this process's batches of one step; returns their part of the mean loss of all the
        step's targets (0-d). Of examples one batch may hold more targets than another, and then counts for more."""
        return self._add_up(*self._next())

    def _next(self):
        """(batches, of how many parts each is one) of the step to make."""
        batches, shares, self._step_tokens, _ = self._ahead or self._load()
        self._ahead = None
        return batches, shares

    def _add_up(self, batches, shares):
        total = 0.0
        for (x, y), parts in zip(batches, shares, strict=True):
            with arithmetic(self.config.dtype, self.config.device):
                loss = self.model(x, y)[1]  # nobody holds the logits: backward writes their gradient in their place
                self.scaler.scale(loss / parts).backward()
            total = total + loss.detach() / parts
        return total

    def _load(self):
        """(this process's batches of the next step on the device, of how many parts each is one, tokens of all
        processes' batches, state before them). Every process draws all batches: so it knows all counts, and the state
        is that of a single process."""
        state = self.batches.state_dict() if self._runs_ahead else None
        batches = [self.batches.next() for _ in range(self.config.gradient_accumulation_steps)]  # (B, T) each
        counts = [int((y != IGNORE_INDEX).sum()) for _, y in batches]
        parts = [sum(counts) / count for count in counts]  # the number of batches, where all are alike
        tokens = sum(x.size for x, _ in batches)
        own = slice(self.world.rank, None, self.world.size)
        arrays = [ids for pair in batches[own] for ids in pair]
        arrays = iter(self._prefetch(*arrays) if self._runs_ahead else map(tg.tensor, arrays))
        return list(zip(arrays, arrays, strict=True)), parts[own], tokens, state

    def _check_finite(self, what, value, lr, iteration=None):
        if math.isfinite(value):
            return
        iteration = self.iteration if iteration is None else iteration
        message = f"{what} is {value} at iteration {iteration}, learning rate {lr:.3g}"
        self.event("diverged", message)
        retry = f"--learning_rate {self.config.learning_rate / 3:.1g} (or a longer --warmup_iters, or --grad_clip 1)"
        if self.saved_at is None:
            raise UserError(f"{message}; nothing was saved yet; start again with {retry}")
        raise UserError(f"{message}; the checkpoint of iteration {self.saved_at} is kept: go on from it with "
                        f"--resume {self.config.out_dir} {retry}")

    def evaluate(self):
        """Evaluate on the validation text, note whether it is the best so far, and tell the callbacks."""
        config = self.config
        with self.interruptible(), arithmetic(config.dtype, config.device):
            batches = validation_batches(self.dataset.val, config.window, config.batch_size, config.eval_iters,
                                         config.seed)
            result = evaluate(self.model, self._own(batches), self.token_bytes, config.device, self.world)
        self._check_finite("the validation loss", result.loss, self.schedule(self.iteration))
        self.evaluated_at = self.iteration
        if self.best_val_loss is None or result.loss < self.best_val_loss:
            self.best_val_loss, self.best_iteration, self.evaluations_since_best = result.loss, self.iteration, 0
        else:
            self.evaluations_since_best += 1
        self.emit("on_evaluation", {"iter": self.iteration, "val_loss": result.loss, "val_ppl": result.perplexity,
                                    "val_bpb": result.bits_per_byte, "val_probability": result.mean_probability})
        return result

    def _own(self, batches):
        """This process's share of the batches of an evaluation, which all processes leave together when interrupted."""
        for number, batch in enumerate(batches):
            if number % self.world.size == self.world.rank:
                yield batch
            if self.world.size > 1 and (number + 1) % self.world.size == 0 and self.world.any(self._interrupted)[0]:
                self._interrupted = True
                raise _Abandoned

    # ---- callbacks and signals ----

    def emit(self, hook, *args):
        """Call the method `hook` of every callback; of several processes the first one does."""
        for callback in self.callbacks if self.world.rank == 0 else ():
            getattr(callback, hook)(self, *args)

    def event(self, event, message):
        """Tell the callbacks of something out of the ordinary, for the log."""
        self.emit("on_event", {"iter": self.iteration, "event": event, "message": message})

    @contextmanager
    def interruptible(self):
        """Within this context Ctrl-C takes effect at once: nothing is under way that must be finished. Several
        processes have to agree first, after a round of an evaluation or a step."""
        self._may_interrupt = self.world.size == 1
        try:
            if self._interrupted and self._may_interrupt:
                raise _Abandoned
            yield
        finally:
            self._may_interrupt = False

    @contextmanager
    def _signals(self):
        """Turn Ctrl-C and SIGTERM into a flag that the loop looks at; Python allows that in the main thread only."""
        if threading.current_thread() is not threading.main_thread():
            yield
            return

        def handle(signum, frame):
            if self._interrupted:
                raise KeyboardInterrupt("stopped at once: nothing more was saved, what was saved before is unharmed")
            self._interrupted = True
            if self.world.rank == 0:
                os.write(2, b"\nstopping: saving first; Ctrl-C again stops at once\n")  # print is not re-entrant
            if self._may_interrupt:
                raise _Abandoned

        before = {number: signal.signal(number, handle) for number in (signal.SIGINT, signal.SIGTERM)}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    # ---- state ----

    def state_dict(self):
        """Everything but the weights that the rest of the run depends on: a tree of Tensors and JSON values."""
        return {
            "iteration": self.iteration,
            "evaluated_at": self.evaluated_at,
            "best_val_loss": self.best_val_loss,
            "best_iteration": self.best_iteration,
            "evaluations_since_best": self.evaluations_since_best,
            "tokens": [len(self.dataset.train), len(self.dataset.val)],
            "batches": self._ahead[3] if self._ahead else self.batches.state_dict(),
            "random": tg.get_rng_state(self.config.device),
            "optimizer": self.optimizer.state_dict()["state"],  # without the options, which are the config's
            **({"scaler": self.scaler.state_dict()} if self.scaler.is_enabled() else {}),
        }

    def load_state_dict(self, state):
        """Continue from what `state_dict` returned; the weights are loaded into the model separately."""
        for name in ("iteration", "evaluated_at", "best_val_loss", "best_iteration", "evaluations_since_best"):
            setattr(self, name, state[name])
        self.saved_at = self.iteration
        self.batches.load_state_dict(state["batches"])
        self._ahead = self._graph = None
        if self.scaler.is_enabled() and "scaler" in state:
            self.scaler.load_state_dict(state["scaler"])
        tg.set_rng_state(state["random"], self.config.device)
        try:
            self.optimizer.load_state_dict(self.optimizer.state_dict() | {"state": state["optimizer"]})
        except ValueError as error:
            raise UserError(f"the checkpoint's optimizer state is not one of {self.config.optimizer} ({error}); resume "
                            "with the run's optimizer, or start from its weights with --init_from") from None
