"""The training loop: step, evaluate, and tell the callbacks."""
import math
import os
import signal
import threading
import time
from contextlib import contextmanager

import tensorgrad as tg
from tensorgrad.nn.utils import get_total_norm

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
    """

    def __init__(self, model, config, dataset, callbacks=()):
        if not isinstance(dataset.val, Examples):
            check_length(dataset.val, config.window if config.eval_iters else 1, "validation")
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
        except _Abandoned:
            pass
        if self._interrupted:
            self.event("interrupt", f"interrupted at iteration {self.iteration}")

    def _finished(self):
        """Evaluate where it is due; whether there is no further step to do."""
        last = self.iteration >= self.config.max_iters
        if (last or self.iteration % self.config.eval_interval == 0) and self.evaluated_at != self.iteration:
            self.evaluate()
        return last or self._interrupted or self.stop_reason is not None

    def stop(self, reason):
        """End the training before its next step; for callbacks."""
        self.stop_reason = reason
        self.event("stop", reason)

    def _train_step(self):
        start = time.perf_counter()
        lr = self.schedule(self.iteration)
        for group in self.optimizer.param_groups:
            group["lr"] = lr
        loss = self._accumulate_gradients()
        norm = get_total_norm([p.grad for p in self.model.parameters() if p.grad is not None]).item()
        self._check_finite("the loss", loss, lr)  # before the weights are touched
        self._check_finite("the gradient norm", norm, lr)
        clip = self.config.grad_clip
        self.optimizer.step(grad_scale=min(1.0, clip / (norm + 1e-6)) if clip else 1.0)
        self.optimizer.zero_grad()
        record = {"iter": self.iteration, "loss": loss, "lr": lr, "grad_norm": norm,
                  "tokens_per_s": self._step_tokens / (time.perf_counter() - start)}
        self.iteration += 1
        self.emit("on_step", record)

    def _accumulate_gradients(self):
        """Forward and backward over the batches of one step; returns the mean loss of all their targets. Of examples
        one batch may hold more targets than another, and then counts for more."""
        batches = [self.batches.next() for _ in range(self.config.gradient_accumulation_steps)]  # (B, T) each
        counts = [int((y != IGNORE_INDEX).sum()) for _, y in batches]
        total, self._step_tokens = 0.0, sum(x.size for x, _ in batches)
        for (x, y), count in zip(batches, counts, strict=True):
            parts = sum(counts) / count  # their number, where all are alike
            with arithmetic(self.config.dtype):
                x, y = (tg.tensor(ids, device=self.config.device) for ids in (x, y))
                loss = self.model(x, y)[1]  # nobody holds the logits: backward writes their gradient in their place
                (loss / parts).backward()
            total += loss.item() / parts
        return total

    def _check_finite(self, what, value, lr):
        if math.isfinite(value):
            return
        message = f"{what} is {value} at iteration {self.iteration}, learning rate {lr:.3g}"
        self.event("diverged", message)
        retry = f"--learning_rate {self.config.learning_rate / 3:.1g} (or a longer --warmup_iters, or --grad_clip 1)"
        if self.saved_at is None:
            raise UserError(f"{message}; nothing was saved yet; start again with {retry}")
        raise UserError(f"{message}; the checkpoint of iteration {self.saved_at} is kept: go on from it with "
                        f"--resume {self.config.out_dir} {retry}")

    def evaluate(self):
        """Evaluate on the validation text, note whether it is the best so far, and tell the callbacks."""
        config = self.config
        with self.interruptible(), arithmetic(config.dtype):
            batches = validation_batches(self.dataset.val, config.window, config.batch_size, config.eval_iters,
                                         config.seed)
            result = evaluate(self.model, batches, self.token_bytes, config.device)
        self._check_finite("the validation loss", result.loss, self.schedule(self.iteration))
        self.evaluated_at = self.iteration
        if self.best_val_loss is None or result.loss < self.best_val_loss:
            self.best_val_loss, self.best_iteration, self.evaluations_since_best = result.loss, self.iteration, 0
        else:
            self.evaluations_since_best += 1
        self.emit("on_evaluation", {"iter": self.iteration, "val_loss": result.loss, "val_ppl": result.perplexity,
                                    "val_bpb": result.bits_per_byte, "val_probability": result.mean_probability})
        return result

    # ---- callbacks and signals ----

    def emit(self, hook, *args):
        """Call the method `hook` of every callback."""
        for callback in self.callbacks:
            getattr(callback, hook)(self, *args)

    def event(self, event, message):
        """Tell the callbacks of something out of the ordinary, for the log."""
        self.emit("on_event", {"iter": self.iteration, "event": event, "message": message})

    @contextmanager
    def interruptible(self):
        """Within this context Ctrl-C takes effect at once: nothing is under way that must be finished."""
        self._may_interrupt = True
        try:
            if self._interrupted:
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
            "batches": self.batches.state_dict(),
            "random": tg.get_rng_state(self.config.device),
            "optimizer": self.optimizer.state_dict()["state"],  # without the options, which are the config's
        }

    def load_state_dict(self, state):
        """Continue from what `state_dict` returned; the weights are loaded into the model separately."""
        for name in ("iteration", "evaluated_at", "best_val_loss", "best_iteration", "evaluations_since_best"):
            setattr(self, name, state[name])
        self.saved_at = self.iteration
        self.batches.load_state_dict(state["batches"])
        tg.set_rng_state(state["random"], self.config.device)
        try:
            self.optimizer.load_state_dict(self.optimizer.state_dict() | {"state": state["optimizer"]})
        except ValueError as error:
            raise UserError(f"the checkpoint's optimizer state is not one of {self.config.optimizer} ({error}); resume "
                            "with the run's optimizer, or start from its weights with --init_from") from None
