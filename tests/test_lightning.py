"""The Lightning callback: fits of LightningModules with and without it."""

import copy
import pickle
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("lightning")

import torch
import torch.nn.functional as F
from lightning.pytorch import Callback, LightningModule, Trainer, callbacks
from lightning.pytorch.plugins import MixedPrecision
from torch import nn
from torch.testing import assert_close

from kdhooks import Distiller, KDHooksError
from kdhooks.testing import TinyFaceNet, tiny_teacher
from kdhooks_integrations.lightning import Distill
from tests.lightning_runs import (
    PROJECTED,
    SILENT,
    Faces,
    Manual,
    Whole,
    distil,
    fit,
    loader,
    recipe,
    weights,
)
from tests.small_distiller import teacher_network

pytestmark = [
    # Lightning warns of loaders without workers, steps without a logger and the like.
    pytest.mark.filterwarnings("ignore::UserWarning:lightning.*"),
    pytest.mark.filterwarnings("ignore:.*LeafSpec:FutureWarning"),  # Lightning with a newer torch
]


def same(one: Any, other: Any) -> None:
    assert_close(one, other, rtol=0, atol=0)


def by_hand(*methods: Any, **keys: Any) -> Faces:
    """Train Faces in a hand-written loop with a Distiller."""
    module = Faces()
    table = recipe(*methods)
    kd = Distiller(
        module.model.train(), tiny_teacher(), table["methods"], input_shape=(3, 32, 32), **keys
    )
    [optimizer], _ = module.configure_optimizers()
    for group in kd.parameter_groups(1e-3):
        optimizer.add_param_group({**group, "lr": 0.05, "momentum": 0.9})
    rate = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 / (step + 1))
    for images, labels in [*loader(), *loader()]:
        task = F.cross_entropy(module.head(module.model(images)), labels) * kd.task_weight
        loss = sum(kd(images, labels).values(), start=task)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        rate.step()
    kd.remove()
    return module


# --- terms ---------------------------------------------------------------------------------------


def test_one_line_trains_as_a_loop_by_hand() -> None:
    module, callback = Faces(), distil()
    fit(module, callback)
    same(weights(module), weights(by_hand()))
    assert callback.distiller is not None
    assert callback.distiller.step == 4


def test_weight_0_is_the_plain_run_to_the_last_bit() -> None:
    plain, distilled = Faces(), Faces()
    fit(plain, gradient_clip_val=0.5)
    fit(
        distilled,
        distil({**PROJECTED, "weight": 0.0}, {"name": "rkd", "weight": 0.0}),
        gradient_clip_val=0.5,
    )
    same(weights(distilled), weights(plain))


class Clipped(Manual):
    """Clips the norm of all gradients, including those of `more` additional parameters."""

    def __init__(self, more: int = 0) -> None:
        super().__init__()
        self.automatic_optimization = more != 0
        self.more = nn.ParameterList(nn.Parameter(torch.ones(3)) for _ in range(more))

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        loss = Faces.training_step(self, batch, batch_idx)
        if self.automatic_optimization:
            return sum((p.square().sum() for p in self.more), start=loss)
        optimizer: Any = self.optimizers()
        optimizer.zero_grad()
        self.manual_backward(loss)
        nn.utils.clip_grad_norm_(self.parameters(), 0.1)
        optimizer.step()
        return None

    def configure_optimizers(self) -> Any:
        return torch.optim.AdamW(self.parameters(), lr=1e-2, weight_decay=0.1)


@pytest.mark.parametrize("more", range(3))
def test_weight_0_leaves_the_clipped_norm_as_it_is(more: int) -> None:
    """Zero gradients of additional parameters could change how the norm is rounded."""
    plain, distilled = Clipped(more), Clipped(more)
    options: dict[str, Any] = {"gradient_clip_val": 0.1} if more else {}
    fit(plain, **options)
    fit(distilled, distil({**PROJECTED, "weight": 0.0}), **options)
    same(weights(distilled), weights(plain))


class Terms(Callback):  # type: ignore[misc]
    """Keeps the values that each step has logged."""

    def __init__(self) -> None:
        self.logged: list[dict[str, float]] = []

    def on_train_batch_end(
        self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        self.logged.append({k: float(v) for k, v in trainer.callback_metrics.items()})


def test_the_terms_are_logged() -> None:
    terms = Terms()
    fit(Faces(), distil("fcd", {"name": "rkd", "weight": 3.0}), terms)
    first = terms.logged[0]
    assert {"kdhooks/fcd", "kdhooks/fcd/weighted", "kdhooks/rkd"} <= first.keys()
    assert first["kdhooks/rkd/weighted"] == pytest.approx(3 * first["kdhooks/rkd"])


class Saving(Callback):  # type: ignore[misc]
    """Saves at the end of each epoch, as ModelCheckpoint does."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def on_train_epoch_end(self, trainer: Any, pl_module: Any) -> None:
        trainer.save_checkpoint(self.path)


class Shared(LightningModule):  # type: ignore[misc]
    """Returns a dict from a shared step; its batches and its optimizer configuration are dicts."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.encoder = TinyFaceNet()
        self.margin = nn.Parameter(torch.randn(6, 12))

    def forward(self, images: Any) -> Any:
        return F.normalize(self.encoder(images))

    def _shared_step(self, batch: Any, stage: str) -> Any:
        embedding = self(batch["image"])
        loss = F.cross_entropy(embedding @ F.normalize(self.margin).T, batch["target"])
        self.log(f"{stage}/loss", loss)
        return {"loss": loss, "embedding": embedding.detach()}

    def training_step(self, batch: Any) -> Any:
        return self._shared_step(batch, "train")

    def validation_step(self, batch: Any) -> Any:
        return self._shared_step(batch, "val")

    def configure_optimizers(self) -> Any:
        optimizer = torch.optim.AdamW(self.parameters(), lr=1e-3, weight_decay=0.1)
        schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 1e-2, total_steps=10)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}


def as_dict(pair: Any) -> Any:
    return {"image": pair[0], "target": pair[1]}


def test_another_style_of_module_is_distilled() -> None:
    module, callback = Shared(), distil(PROJECTED)
    before = weights(module)
    trainer = fit(module, callback, data=loader(wrap=as_dict))
    assert callback.distiller is not None
    assert callback.distiller.step == 4
    [optimizer] = trainer.optimizers
    [projector] = [p for p in callback.distiller.parameters() if p.ndim == 2]
    held = [[p is projector for p in group["params"]] for group in optimizer.param_groups]
    assert held == [[False] * len(list(module.parameters())), [True]]
    assert optimizer.param_groups[-1]["lr"] == optimizer.param_groups[0]["lr"]
    assert not torch.equal(before["encoder.fc.weight"], module.encoder.fc.weight)


class Direct(Manual):
    """Calls loss.backward() instead of manual_backward."""

    def manual_backward(self, loss: Any) -> None:
        raise AssertionError

    def training_step(self, batch: Any, batch_idx: int) -> None:
        loss = Faces.training_step(self, batch, batch_idx)
        loss.backward()
        optimizer: Any = self.optimizers()
        optimizer.step()


def test_manual_optimization_trains_the_same() -> None:
    manual, automatic = Manual(), Faces()
    fit(manual, distil())
    fit(automatic, distil())
    same(weights(manual), weights(automatic))


def test_manual_optimization_without_manual_backward_is_refused() -> None:
    with pytest.raises(KDHooksError, match=r"optimizer steps before kd.*self\.manual_backward"):
        fit(Direct(), distil())


# --- precision, accumulation, compile, copies -----------------------------------------------------


@pytest.mark.parametrize("precision", ["bf16-mixed", "16-mixed", "64-true", "bf16-true"])
def test_other_precisions_train(precision: Any) -> None:
    module, callback = Faces(), distil(PROJECTED, "rkd")
    before = weights(module)
    options: dict[str, Any] = {"precision": precision}
    if precision == "16-mixed":  # the Trainer supports this only on GPUs
        scaler = torch.amp.GradScaler("cpu", init_scale=128.0)
        options = {"plugins": MixedPrecision("16-mixed", "cpu", scaler)}
    fit(module, callback, **options)
    assert callback.distiller is not None
    assert callback.distiller.step == 4
    assert all(p.isfinite().all() for p in module.parameters())
    assert not torch.equal(before["model.fc.weight"].double(), module.model.fc.weight.double())


def test_gradients_are_accumulated_and_clipped_together() -> None:
    """Two batches per step use the mean of their losses, like a hand-written loop."""
    module, callback = Faces(), distil()
    fit(module, callback, epochs=1, accumulate_grad_batches=2, gradient_clip_val=0.1)
    hand = Faces()
    kd = Distiller(hand.model.train(), tiny_teacher(), [PROJECTED], input_shape=(3, 32, 32))
    [optimizer], _ = hand.configure_optimizers()
    for group in kd.parameter_groups(1e-3):
        optimizer.add_param_group({**group, "lr": 0.05, "momentum": 0.9})
    for batch in loader():
        loss = hand.training_step(batch, 0)
        total: Any = sum(kd(*batch).values(), start=loss)
        (total / 2).backward()
    nn.utils.clip_grad_norm_([p for g in optimizer.param_groups for p in g["params"]], 0.1)
    optimizer.step()
    kd.remove()
    assert_close(weights(module), weights(hand), rtol=1e-5, atol=1e-6)


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor")  # dynamo reads it
def test_a_compiled_student_is_distilled() -> None:
    module = Faces()
    module.model = torch.compile(module.model, backend="eager")  # type: ignore[assignment]
    fit(module, callback := distil())
    plain = Faces()
    fit(plain, distil())
    same([*module.parameters()], [*plain.parameters()])
    assert callback.distiller is not None


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor")  # dynamo reads it
def test_a_compiled_module_is_distilled() -> None:
    module = Faces()
    compiled: Any = torch.compile(module, backend="eager")
    fit(compiled, distil())
    plain = Faces()
    fit(plain, distil())
    assert_close(weights(module), weights(plain), rtol=1e-5, atol=1e-6)


averaging = pytest.mark.skipif(
    not hasattr(callbacks, "EMAWeightAveraging"), reason="since Lightning 2.6"
)


@averaging
def test_an_average_of_the_weights_is_kept_and_resumed(tmp_path: Path) -> None:
    plain, distilled, rest = Faces(), Faces(), Faces()
    zero = {**PROJECTED, "weight": 0.0}
    saving = Saving(tmp_path / "half.ckpt")
    fit(plain, callbacks.EMAWeightAveraging(decay=0.5), epochs=4)
    fit(distilled, distil(zero), callbacks.EMAWeightAveraging(decay=0.5), saving)
    averaged = [distil(zero), callbacks.EMAWeightAveraging(decay=0.5)]
    fit(rest, *averaged, epochs=4, ckpt=saving.path)
    same(weights(rest), weights(plain))


@averaging
def test_a_weight_average_before_distill_is_refused() -> None:
    with pytest.raises(KDHooksError, match="must stand before EMAWeightAveraging"):
        fit(Faces(), callbacks.EMAWeightAveraging(), distil())


def test_validation_batches_are_not_counted_as_steps() -> None:
    plain, watched = Faces(), Faces()
    fit(plain, callback := distil())
    torch.manual_seed(3)
    other = distil()
    Trainer(max_epochs=2, callbacks=[other], **SILENT).fit(watched, loader(), loader())
    same(weights(watched), weights(plain))
    assert callback.distiller is not None
    assert other.distiller is not None
    assert other.distiller.step == callback.distiller.step == 4


# --- recipes -------------------------------------------------------------------------------------


def test_the_callback_follows_the_keys_of_a_recipe() -> None:
    """The recipe has a student view, no labels, a weight of the trainer's loss and two teachers."""
    table = recipe(
        {**PROJECTED, "weight": {"value": 4.0, "warmup": 1, "unit": "epoch"}},
        student_view={"mask": {"p": 1.0}},
        labels=False,
        task_weight=0.5,
    )
    table["teacher"] = [table["teacher"], tiny_teacher(width=4).module]
    seen: list[Any] = []

    class Watching(Faces):
        def training_step(self, batch: Any, batch_idx: int) -> Any:
            handle = self.model.layer1.register_forward_pre_hook(
                lambda _, args: seen.append((args[0], batch[0]))
            )
            loss = super().training_step(batch, batch_idx)
            handle.remove()
            return loss

    module, callback, terms = Watching(), Distill(table), Terms()
    fit(module, callback, terms)
    kd = callback.distiller
    assert kd is not None
    assert kd.task_weight == 0.5
    assert kd.step == 4
    assert kd.steps_per_epoch == 2
    assert all(not torch.equal(view, images) for view, images in seen)
    weighted = [x["kdhooks/fcd/weighted"] / x["kdhooks/fcd"] for x in terms.logged]
    assert weighted == pytest.approx([0.0, 2.0, 4.0, 4.0])


def test_the_trainers_loss_is_weighted() -> None:
    module = Faces()
    fit(module, distil(task_weight=0.25))
    same(weights(module), weights(by_hand(task_weight=0.25)))


def test_a_classifier_is_named_by_its_path(tmp_path: Path) -> None:
    rows = tiny_teacher().classifier
    assert rows is not None
    table = recipe("kd", {"name": "thkd"})
    table["teacher"] = {"module": table["teacher"], "classifier": rows}
    with pytest.raises(KDHooksError, match=r"in Lightning.*classifier='head\.weight'"):
        fit(Faces(), Distill(table))
    fit(Faces(), callback := Distill(table, classifier="head.weight"))
    assert callback.distiller is not None
    assert callback.distiller.step == 4


def test_other_images_for_the_teacher() -> None:
    """The teacher gets the clean images of the batch, the student gets changed ones."""

    class Noisy(Faces):
        def training_step(self, batch: Any, batch_idx: int) -> Any:
            images, labels = batch["clean"], batch["who"]
            return super().training_step((images + 1.0, labels), batch_idx)

    seen: list[Any] = []
    module = teacher_network()
    module.register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    table = {**recipe(), "teacher": module}
    data = loader(wrap=lambda pair: {"clean": pair[0], "who": pair[1]})
    fit(Noisy(), Distill(table, images="clean", labels="who"), data=data, epochs=1)
    same(seen[-1], list(data)[-1]["clean"])


# --- checkpoints ---------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", [Faces, Shared, Manual])
def test_a_resumed_run_is_the_straight_one(kind: Any, tmp_path: Path) -> None:
    view = {"mask": {"p": 0.5}}
    data = loader(wrap=as_dict) if kind is Shared else loader()
    methods = [PROJECTED, "rkd"]
    straight, half, rest = kind(), kind(), kind()
    first, last = distil(*methods, student_view=view), distil(*methods, student_view=view)
    end = fit(straight, first, data=data, epochs=4)
    saving = Saving(tmp_path / "half.ckpt")
    fit(half, distil(*methods, student_view=view), saving, data=data)
    resumed = fit(rest, last, data=data, epochs=4, ckpt=saving.path)
    same(weights(rest), weights(straight))
    assert first.distiller is not None
    assert last.distiller is not None
    same(first.distiller.state_dict(), last.distiller.state_dict())
    assert last.distiller.step == 8
    same(end.optimizers[0].param_groups[-1]["lr"], resumed.optimizers[0].param_groups[-1]["lr"])


def test_checkpoints_are_exchanged_with_plain_runs(tmp_path: Path) -> None:
    zero = {**PROJECTED, "weight": 0.0}
    plain, distilled = Faces(), Faces()
    a, b = tmp_path / "plain.ckpt", tmp_path / "distilled.ckpt"
    fit(plain, Saving(a))
    fit(distilled, distil(zero), Saving(b))
    one, two = (torch.load(path, weights_only=True) for path in (a, b))
    same(one["state_dict"], two["state_dict"])
    kept = copy.deepcopy(two["optimizer_states"][0])
    assert kept.pop("kdhooks")["param_groups"]
    same(kept, one["optimizer_states"][0])
    same(one["lr_schedulers"], two["lr_schedulers"])
    assert one["callbacks"] == {}
    assert two["callbacks"]["Distill"].keys() == {"losses.fcd.projector.weight", "_extra_state"}
    straight, onward, back = Faces(), Faces(), Faces()
    fit(straight, epochs=4)
    fit(onward, callback := distil(zero), epochs=4, ckpt=a)
    fit(back, epochs=4, ckpt=b)
    same(weights(onward), weights(straight))
    same(weights(back), weights(straight))
    assert callback.distiller is not None
    assert callback.distiller.step == 4  # counted from the resume: the plain run has no Distiller
    Faces.load_from_checkpoint(b)


def test_another_recipe_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "one.ckpt"
    fit(Faces(), distil()).save_checkpoint(path)
    with pytest.raises(KDHooksError, match="written with other methods than the recipe's"):
        fit(Faces(), distil("fcd"), epochs=4, ckpt=path)


def test_a_second_fit_goes_on() -> None:
    module, callback = Faces(), distil()
    trainer = fit(module, callback)
    assert not hasattr(module, "kdhooks")
    assert "training_step" not in vars(module)
    first = callback.distiller
    trainer.fit_loop.max_epochs = 4
    trainer.fit(module, loader())
    assert first is not None
    assert callback.distiller is not None
    assert callback.distiller is not first
    assert callback.distiller.step == 8


def test_a_pickle_of_the_callback_starts_where_the_fit_has_ended() -> None:
    """Strategies that start processes pickle the callback, and copying a Trainer copies it."""
    fit(Faces(), callback := distil())
    for copied in pickle.loads(pickle.dumps(callback)), copy.deepcopy(callback):
        fit(Faces(), copied)
        assert copied.distiller is not None
        assert copied.distiller.step == 8
    assert callback.distiller is not None
    assert callback.distiller.step == 4


class Copying(Callback):  # type: ignore[misc]
    """Copies the LightningModule during training, like callbacks that average the weights."""

    def __init__(self, copied: Any) -> None:
        self.copied = copied
        self.copy: Any = None

    def on_train_batch_end(
        self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        held, pl_module._trainer = pl_module._trainer, None
        self.copy = self.copied(pl_module)
        pl_module._trainer = held


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda one: pickle.loads(pickle.dumps(one))])
@pytest.mark.parametrize("kind", [Faces, Manual, Whole])
def test_a_copy_of_the_module_takes_the_plain_step(kind: Any, copied: Any) -> None:
    module, copying = kind(), Copying(copied)
    fit(module, distil(), copying)
    assert not hasattr(module, "kdhooks")
    del copying.copy.kdhooks
    plain = kind()
    plain.load_state_dict(copying.copy.state_dict())
    fit(copying.copy)
    fit(plain)
    same(weights(copying.copy), weights(plain))
    assert not torch.equal(*(next(one.parameters()) for one in (module, plain)))


def test_a_copy_keeps_a_step_that_was_set_on_the_object() -> None:
    module, copying = Faces(), Copying(copy.deepcopy)
    step = module.training_step
    module.training_step = lambda batch, batch_idx: step(batch, batch_idx)  # type: ignore[method-assign]
    set_there = module.training_step
    fit(module, distil(), copying)
    assert copying.copy.training_step is set_there
    assert module.training_step is set_there


def test_a_batch_may_be_skipped() -> None:
    class Skipping(Faces):
        def training_step(self, batch: Any, batch_idx: int) -> Any:
            loss = super().training_step(batch, batch_idx)
            return None if batch_idx else loss

    module, callback = Skipping(), distil()
    fit(module, callback)
    assert callback.distiller is not None
    assert callback.distiller.step == 2


def test_nothing_is_left_behind_by_an_error() -> None:
    class Failing(Faces):
        def training_step(self, batch: Any, batch_idx: int) -> Any:
            loss = super().training_step(batch, batch_idx)
            if batch_idx:
                raise ValueError("a fault of the module's own")
            return loss

    module = Failing()
    with pytest.raises(ValueError, match="of the module's own"):
        fit(module, distil())
    assert not hasattr(module, "kdhooks")
    assert not module.model._forward_hooks


# --- where the layers are created ----------------------------------------------------------------


@pytest.mark.parametrize("hook", ["setup", "configure_model"])
def test_layers_may_be_created_in_a_hook(hook: str) -> None:
    class Late(Faces):
        def __init__(self) -> None:
            LightningModule.__init__(self)

        def make(self, stage: str = "") -> None:
            made = Faces()
            self.model, self.head = made.model, made.head

    setattr(Late, hook, Late.make)
    late, early = Late(), Faces()
    fit(late, distil())
    fit(early, distil())
    same(weights(late), weights(early))


def test_a_module_may_be_the_student_itself() -> None:
    module, callback = Whole(), distil()
    fit(module, callback)
    assert callback.distiller is not None
    assert callback.distiller.step == 4


# --- refused -------------------------------------------------------------------------------------


class Two(Faces):
    def __init__(self) -> None:
        super().__init__()
        self.other = TinyFaceNet()


class Several(Faces):
    def __init__(self) -> None:
        super().__init__()
        self.automatic_optimization = False

    def configure_optimizers(self) -> Any:
        parts = self.model.layer1, self.model.fc
        return [torch.optim.SGD(part.parameters(), lr=0.1) for part in parts]


class Bare(Faces):
    def training_step(self, batch: Any, batch_idx: int) -> Any:
        return F.cross_entropy(self.head(self.model.forward(batch[0])), batch[1])


class Foreign(Faces):
    def configure_optimizers(self) -> Any:
        class Rate:
            def __init__(self, optimizer: Any) -> None:
                self.optimizer = optimizer

            def step(self) -> None: ...
            def state_dict(self) -> Any:
                return {}

            def load_state_dict(self, state: Any) -> None: ...

        optimizer = torch.optim.SGD(self.parameters(), lr=0.1)
        return [optimizer], [Rate(optimizer)]

    def lr_scheduler_step(self, scheduler: Any, metric: Any) -> None: ...


@pytest.mark.parametrize(
    ("module", "words"),
    [
        (Two, r"several return \(b d\) for images: model, other; name it as Distill\(…, student="),
        (Several, r"one optimizer must train .* found 2 .* self\.kdhooks\.parameter_groups"),
        (Bare, r"the student 'model' did not run in training mode; call it as a module"),
        (Foreign, r"schedule must be a torch\.optim\.lr_scheduler; found Rate"),
    ],
)
def test_a_module_that_cannot_be_distilled_is_refused(module: Any, words: str) -> None:
    with pytest.raises(KDHooksError, match=words):
        fit(module(), distil())


def test_missing_labels_are_refused() -> None:
    data = loader(wrap=lambda pair: pair[:1])

    class Unlabelled(Faces):
        def training_step(self, batch: Any, batch_idx: int) -> Any:
            return self.head(self.model(batch[0])).square().mean()

    table = recipe("coupleface")
    table["teacher"] = {"module": table["teacher"], "classifier": tiny_teacher().classifier}
    with pytest.raises(KDHooksError, match=r"labels .* in second place; found \[float32 \(12, 3, "):
        fit(Unlabelled(), Distill(table), data=data)


def test_a_wrong_path_is_refused() -> None:
    with pytest.raises(KDHooksError, match="no submodule 'modle'; did you mean 'model'"):
        fit(Faces(), Distill(recipe(), student="modle"))
    with pytest.raises(KDHooksError, match=r"no such parameter; did you mean 'head\.weight'"):
        fit(Faces(), Distill(recipe(), classifier="head.weights"))
    with pytest.raises(KDHooksError, match=r"inside of it are: head\.weight"):
        fit(Faces(), Distill(recipe(), classifier="head"))


def test_a_module_that_has_such_a_child_is_refused() -> None:
    module = Faces()
    module.kdhooks = nn.Identity()
    with pytest.raises(KDHooksError, match="'kdhooks'; keep one Distill"):
        fit(module, distil())
