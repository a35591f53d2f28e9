"""The trainer's logger receives every term, skipped steps are counted, and a run is summarised."""

from pathlib import Path

import pytest

from tests.arcface_runs import COUPLEFACE, FCD, install
from tests.standin import Trainer


def test_the_trainers_logger_gets_every_term_at_its_own_interval(
    one: Trainer, teacher: dict[str, str]
) -> None:
    (report,) = one.run(
        below_imports="values = []\n" + install(teacher, FCD, COUPLEFACE),
        before_loop=(
            "installed.attachment.distiller.register_forward_hook(\n"
            "    lambda module, args, terms: values.append(float(module.metrics['fcd']))\n"
            ")"
        ),
        steps=5,
        ask={"values": "values"},
    )
    logged = {(step, tag): value for step, tag, value in report["logged"]}
    first, second, third, fourth, _ = report["extra"]["values"]
    assert logged[2, "kdhooks/fcd"] == pytest.approx((first + second) / 2)
    assert logged[4, "kdhooks/fcd"] == pytest.approx((third + fourth) / 2)
    assert logged[4, "kdhooks/fcd/weighted"] == pytest.approx(8 * (third + fourth) / 2)
    assert {step for step, _ in logged} == {2, 4}
    assert (4, "kdhooks/coupleface/active") in logged


def test_steps_that_the_optimizer_skipped_are_counted(
    one: Trainer, teacher: dict[str, str]
) -> None:
    skip = (
        "calls, taken = [], opt.step\n"
        "opt.step = lambda: calls.append(1) or (taken() if len(calls) != 2 else None)"
    )
    ask = {"skipped": "installed.attachment.skipped"}
    line = install(teacher, FCD)
    (report,) = one.run(below_imports=line, before_loop=skip, ask=ask)
    assert report["extra"] == {"skipped": 1}
    assert one.run(below_imports=line, ask=ask)[0]["extra"] == {"skipped": 0}


def test_a_term_that_fails_in_the_last_step_is_noticed_before_the_student_is_saved(
    one: Trainer, teacher: dict[str, str]
) -> None:
    third = (
        "kd = installed.attachment.distiller\n"
        "kd._session.teacher.module.register_forward_hook(\n"
        "    lambda m, given, out, kd=kd, bad=torch.nan: out * bad if kd.step == 2 else out\n"
        ")\n"
    )
    (report,) = one.run(below_imports=install(teacher, FCD), before_loop=third)
    assert report["error"] == "KDHooksError"
    assert "step 3: fcd not finite and the teacher's embedding not finite" in report["message"]
    assert not (Path(report["output"]) / "model.pt").exists()


def test_the_means_of_the_whole_run_are_available(one: Trainer, teacher: dict[str, str]) -> None:
    ask = {
        "whole": "installed.attachment._interval.overall()['fcd']",
        "fcd": "[v for _, tag, v in callback_logging.writer.logged if tag == 'kdhooks/fcd']",
    }
    (report,) = one.run(below_imports=install(teacher, FCD), steps=4, ask=ask)
    assert report["extra"]["whole"] == pytest.approx(sum(report["extra"]["fcd"]) / 2)
