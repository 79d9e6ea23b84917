from __future__ import annotations

import pickle
from typing import Any

import pytest
from pydantic import ValidationError

from trainer.config import DistillConfig, StudentConfig, StudentRecipe, StudentWorkers, TrainConfig, grid_problem

TRAIN = TrainConfig.model_validate(
    {"on": ["a"], "steps": 7, "clip_grad_norm": 0.5, "loss": {"betas": 0.25}, "seeds": [1]}
)


def student(**given: Any) -> StudentConfig:
    return StudentConfig.model_validate({"backbone": "mobilenetv3_small_100", **given})


def test_a_student_inherits_everything_it_does_not_say() -> None:
    recipe = student().resolve(TRAIN)
    assert (recipe.on, recipe.steps, recipe.clip_grad_norm, recipe.loss.betas) == (["a"], 7, 0.5, 0.25)
    assert recipe.distill.strategy == "none"


def test_a_student_overrides_any_key_of_train_null_included() -> None:
    recipe = student(on=["b"], steps=3, clip_grad_norm=None, distill={"outputs": 0.3}).resolve(TRAIN)
    assert (recipe.on, recipe.steps, recipe.clip_grad_norm) == (["b"], 3, None)
    assert recipe.distill.strategy == "outputs"


def test_one_loss_weight_leaves_the_others_as_train_says() -> None:
    loss = student(loss={"keypoints_2d": 0.5}).resolve(TRAIN).loss
    assert (loss.keypoints_2d, loss.betas, loss.keypoints_3d) == (0.5, 0.25, 0.05)


def test_a_default_spelt_out_still_overrides() -> None:
    assert student(steps=100_000).resolve(TRAIN).steps == 100_000


@pytest.mark.parametrize(
    ("given", "where"),
    [
        ({"stepps": 3}, ("stepps",)),
        ({"seeds": [1]}, ("seeds",)),
        ({"steps": 0}, ("steps",)),
        ({"distill": {"output": 0.3}}, ("distill", "output")),
        ({"distill": {"preset": "papper"}}, ("distill", "preset")),
        ({"distill": {"preset": "paper", "alignment": "geometric"}}, ("distill",)),
        ({"distill": {"alignment": "geometrical"}}, ("distill", "alignment")),
        ({"head": "lite"}, ("head",)),
        ({"vit": {"depth": 4}}, ()),
        ({"head": "light", "decoder": {"depth": 2}}, ()),
        ({"backbone": "hamer", "vit": {"embed_dim": 100, "num_heads": 3}}, ("vit",)),
        ({"backbone": "hamer", "vit": {"dept": 4}}, ("vit", "dept")),
        ({"on": []}, ("on",)),
    ],
)
def test_a_misspelt_key_or_strategy_is_an_error(given: dict[str, Any], where: tuple[str, ...]) -> None:
    with pytest.raises(ValidationError) as caught:
        student(**given)
    assert [error["loc"] for error in caught.value.errors()] == [where]


def test_a_student_prints_only_what_was_given() -> None:
    dumped = student(steps=3).model_dump()
    assert dumped["steps"] == 3
    assert "lr" not in dumped
    assert StudentConfig.model_validate(dumped).resolve(TRAIN) == student(steps=3).resolve(TRAIN)
    assert "default" not in StudentConfig.model_json_schema()["properties"]["lr"]


def test_a_recipe_is_frozen_picklable_and_knows_what_decides_its_weights() -> None:
    recipe = student(lr=0.5).resolve(TRAIN)
    assert pickle.loads(pickle.dumps(recipe)) == recipe  # noqa: S301 (our own bytes)
    with pytest.raises(ValidationError):
        recipe.steps = 4  # type: ignore[misc]
    assert recipe.identity() == recipe.model_copy(update={"log_every": 1, "loader_workers": 5}).identity()
    assert recipe.identity() != StudentRecipe.model_validate(recipe.model_dump() | {"lr": 0.25}).identity()


def test_what_a_student_looks_at_is_part_of_the_identity_when_it_is_no_crop() -> None:
    whole = student().resolve(TRAIN).identity()
    assert "input_px" not in whole
    assert student(input_px=256).resolve(TRAIN).identity() == whole
    assert student(input_px=128).resolve(TRAIN).identity() == whole | {"input_px": 128}
    with pytest.raises(ValidationError, match="leave input_px out"):
        student(backbone="hamer", input_px=128)


def test_an_unserved_grid_names_the_grids_that_would_serve() -> None:
    paper = DistillConfig(features=1.0)
    geometric = DistillConfig(features=1.0, alignment="geometric")
    assert grid_problem(paper, "8x8-paper") is None
    assert grid_problem(geometric, "full") is None
    assert grid_problem(DistillConfig(outputs=1.0), "8x6-geometric") is None
    assert "8x6-geometric or full" in str(grid_problem(geometric, "8x8-paper"))
    assert "8x8-paper or full" in str(grid_problem(paper, "8x6-geometric"))


def test_workers_are_part_of_the_identity_when_there_are_several() -> None:
    alone = student().resolve(TRAIN).identity()
    assert student(workers={"cpus": 2, "gpus": 0}).resolve(TRAIN).identity() == alone
    assert "workers" not in alone
    two = student(workers={"count": 2, "cpus": 2}).resolve(TRAIN).identity()
    assert two == alone | {"workers": {"count": 2}}


def test_one_key_of_workers_leaves_the_others_as_train_says() -> None:
    train = TRAIN.model_copy(update={"workers": StudentWorkers(count=2, cpus=3)})
    four = student(workers={"count": 4})
    assert four.resolve(train).workers == StudentWorkers(count=4, cpus=3)
    assert StudentConfig.model_validate(four.model_dump(mode="json")).resolve(train) == four.resolve(train)


def test_a_batch_is_shared_equally_or_not_at_all() -> None:
    with pytest.raises(ValidationError, match="a batch_size of 64 cannot be shared equally by 3 workers"):
        student(workers={"count": 3}).resolve(TRAIN)


def test_a_key_that_says_nothing_new_leaves_the_identity() -> None:
    said = student(distill={"features": 0.2, "projection": "frozen"}).resolve(TRAIN).identity()
    unsaid = student(distill={"features": 0.2}).resolve(TRAIN).identity()
    assert said["distill"]["projection"] == "frozen"
    assert said["distill"] == unsaid["distill"] | {"projection": "frozen"}


def test_an_optimizer_is_part_of_the_identity_where_it_is_another() -> None:
    assert "optimizer" not in student().resolve(TRAIN).identity()
    assert student(optimizer="muon").resolve(TRAIN).identity() == student().resolve(TRAIN).identity() | {
        "optimizer": "muon"
    }


def test_the_compared_stage_is_part_of_the_identity_when_it_is_not_the_last() -> None:
    last = student(distill={"features": 0.2}).resolve(TRAIN).identity()
    stage = student(distill={"features": 0.2, "at_stride": 16}).resolve(TRAIN).identity()
    assert "at_stride" not in last["distill"]
    assert stage["distill"] == last["distill"] | {"at_stride": 16}
    idle = student(distill={"outputs": 0.2, "at_stride": 16}).resolve(TRAIN)
    assert idle.identity() == student(distill={"outputs": 0.2}).resolve(TRAIN).identity()
    with pytest.raises(ValidationError, match="compare the last map"):
        student(distill={"features": 1.8, "preset": "paper", "at_stride": 16})


def test_the_paper_never_trained_its_projection() -> None:
    with pytest.raises(ValidationError, match="the published one was never trained"):
        student(distill={"features": 1.8, "preset": "paper", "projection": "trained"})
