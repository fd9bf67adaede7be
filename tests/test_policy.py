"""common/policy.py: a run's policy acts in a user's own loop as it acts in the run's evaluation."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch

import ogpo_state as og
from common import checkpoint, cli, record
from common.errors import UserError
from common.policy import load_policy
from common.rng import Rng
from tests.helpers import perturbed, small_agent


def save_run(folder: Path, **values: object) -> tuple[og.Agent, og.Args]:
    """A run folder with the checkpoint of a small agent of these arguments, as a script leaves it."""
    agent, args = small_agent(og, **values)
    perturbed(agent.actor, 0.1)
    agent.actor_ema.load_state_dict(agent.actor.state_dict())
    perturbed(agent.critic_ema, 0.1)
    agent.best_of_n_on = True
    folder.mkdir()
    checkpoint.save(folder / "checkpoint.pt", {"step": 1, "args": cli.flatten(args), "agent": checkpoint.pack(agent)})
    made = {"script": "ogpo_state.py", "definitions": record.definitions((og.VelocityNet, og.CriticEnsemble))}
    (folder / "args.json").write_text(json.dumps(made))
    return agent, args


@pytest.mark.parametrize(("which", "function"), [("acting", og.act_best_of_n), ("noise-free", og.act_ode)])
def test_load_policy_acts_as_the_agent_of_the_run(which: str, function: object, tmp_path: Path) -> None:
    agent, args = save_run(tmp_path / "run")
    policy, obs = (
        load_policy(tmp_path / "run", which, device="cpu", seed=3),
        np.random.default_rng(0).normal(size=(6, 5)),
    )
    expected = function(agent, args, torch.from_numpy(obs).float(), Rng(3, torch.device("cpu"))).numpy()
    np.testing.assert_array_equal(policy.chunks(obs), expected)
    again = load_policy(tmp_path / "run", which, device="cpu", seed=3)
    one = function(agent, args, torch.from_numpy(obs[:1]).float(), Rng(3, torch.device("cpu"))).numpy()[0]
    acted = np.stack([again(obs[0]), *(again(obs[i]) for i in range(1, 4))])
    np.testing.assert_array_equal(acted, one)  # a chunk is executed to its end, whatever is seen meanwhile
    again(obs[4])
    again.reset()
    assert not again.queue


@pytest.mark.parametrize(
    ("record_of", "said"),
    [
        ({}, "without an args.json"),
        ({"script": "flm_train.py", "definitions": {}}, "trains no robot policy"),
        ({"script": "gone.py", "definitions": {}}, "made by gone.py, which is not here"),
        ({"script": "/elsewhere/gone.py", "definitions": {}}, "made by gone.py, which is not here"),
    ],
)
def test_load_policy_refuses_other_folders_in_one_line(record_of: dict, said: str, tmp_path: Path) -> None:
    save_run(tmp_path / "run")
    (tmp_path / "run" / "args.json").write_text(json.dumps(record_of))
    with pytest.raises(UserError, match=said):
        load_policy(tmp_path / "run")


def test_loaded_policy_refuses_observations_of_another_width(tmp_path: Path) -> None:
    save_run(tmp_path / "run")
    with pytest.raises(UserError, match="takes observations of 5 numbers, got 7"):
        load_policy(tmp_path / "run", device="cpu")(np.zeros(7))
