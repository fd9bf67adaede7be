"""The robot tasks as data: what each is called in its suite, its layout, its horizon and its demonstrations."""

from dataclasses import dataclass, replace


@dataclass(frozen=True)
class TaskSpec:
    """One task. A user's own environment has no horizon, dataset or layout here: it brings its own."""

    name: str
    suite: str  # a key of common.envs.SUITES
    env_name: str
    horizon: int | None = None
    datasets: tuple[str, ...] = ()  # published demonstrations of robomimic or Minari, those of the paper first
    obs: tuple[tuple[str, int], ...] = ()  # name and width of the parts of an observation, in order
    action_dim: int = 0
    tasks: tuple[str, ...] = ()  # several under one policy: an episode is of tasks[seed % len(tasks)]
    demo_weights: tuple[int, ...] = ()  # shares of `tasks` in the scripted demonstrations
    goals: tuple[str, ...] = ()  # what has to be done, in Kitchen
    raw: bool = False  # Adroit: the benchmark's own reward, and no end at the first success
    proprio: tuple[int, ...] = ()  # the observation's numbers that the robot feels itself, to go with images


_PANDA = (("robot0_eef_pos", 3), ("robot0_eef_quat", 4), ("robot0_gripper_qpos", 2))
_PANDAS = (*_PANDA, ("robot1_eef_pos", 3), ("robot1_eef_quat", 4), ("robot1_gripper_qpos", 2))


def _robosuite(name: str, env: str, horizon: int, datasets: tuple[str, ...], objects: int, arms: int = 1) -> TaskSpec:
    obs = (*(_PANDA if arms == 1 else _PANDAS), ("object", objects))
    return TaskSpec(name, "robosuite", env, horizon, datasets, obs, 7 * arms, proprio=tuple(range(9 * arms)))


def _metaworld(name: str) -> TaskSpec:
    own = f"metaworld-{name}" if name == "hammer" else name  # hammer is Adroit's
    cap = 400 if name == "push-back" else 200  # its demonstrator is slow
    return TaskSpec(own, "metaworld", f"{name}-v3", cap, (), (("state", 39),), 4)


def _metaworld_set(name: str, tasks: dict[str, int]) -> TaskSpec:
    obs = (("state", 39), ("task", len(tasks)))
    return TaskSpec(name, "metaworld", name, 200, (), obs, 4, tuple(tasks), tuple(tasks.values()))


def _adroit(name: str, width: int, action_dim: int) -> tuple[TaskSpec, TaskSpec, TaskSpec]:
    env, obs = f"AdroitHand{name.capitalize()}", (("state", width),)
    sparse = TaskSpec(name, "adroit", f"{env}Sparse-v1", 200, MINARI, obs, action_dim)
    raw = replace(sparse, name=f"{name}-raw", raw=True)
    return sparse, raw, replace(raw, name=f"{name}-dense", env_name=f"{env}-v1")


def _kitchen(name: str, width: int, goals: tuple[str, ...]) -> TaskSpec:
    obs = (("observation", 59), ("achieved_goal", width), ("desired_goal", width))
    return TaskSpec(f"kitchen-{name}", "kitchen", "FrankaKitchen-v1", 600, (name,), obs, 9, goals=goals)


def _fetch(name: str, env: str, width: int) -> TaskSpec:
    obs = (("observation", width), ("desired_goal", 3))
    return TaskSpec(f"fetch-{name}", "fetch", f"Fetch{env}-v4", 50, (), obs, 4)


METAWORLD = (  # all tasks of version 3
    "peg-insert-side", "assembly", "hand-insert", "pick-place", "basketball", "bin-picking", "box-close",
    "button-press", "button-press-topdown", "button-press-topdown-wall", "button-press-wall", "coffee-button",
    "coffee-pull", "coffee-push", "dial-turn", "disassemble", "door-close", "door-lock", "door-open", "door-unlock",
    "drawer-close", "drawer-open", "faucet-close", "faucet-open", "hammer", "handle-press", "handle-press-side",
    "handle-pull", "handle-pull-side", "lever-pull", "peg-unplug-side", "pick-out-of-hole", "pick-place-wall",
    "plate-slide", "plate-slide-back", "plate-slide-back-side", "plate-slide-side", "push", "push-back", "push-wall",
    "reach", "reach-wall", "shelf-place", "soccer", "stick-pull", "stick-push", "sweep", "sweep-into",
    "window-close", "window-open",
)  # fmt: skip
MINARI = ("expert", "human", "cloned")
MT10 = {  # task: share of the demonstrations. With equal ones half of the tasks are cloned before the others begin.
    "reach": 2, "push": 12, "pick-place": 12, "door-open": 2, "drawer-open": 4, "drawer-close": 1,
    "button-press-topdown": 2, "peg-insert-side": 13, "window-open": 1, "window-close": 1,
}  # fmt: skip
TASKS = {
    task.name: task
    for task in (
        TaskSpec("toy", "toy", "toy", 40, obs=(("state", 6),), action_dim=2, proprio=(0, 1, 4, 5)),
        _robosuite("lift", "Lift", 300, ("ph", "mh"), 10),
        _robosuite("can", "PickPlaceCan", 300, ("ph", "mh"), 14),
        _robosuite("square", "NutAssemblySquare", 400, ("mh", "ph"), 14),
        _robosuite("tool_hang", "ToolHang", 1_000, ("ph",), 44),
        _robosuite("transport", "TwoArmTransport", 800, ("mh", "ph"), 41, arms=2),
        *map(_metaworld, METAWORLD),
        _metaworld_set("mt10", MT10),
        *_adroit("door", 39, 28),
        *_adroit("hammer", 46, 26),
        *_adroit("pen", 45, 24),
        *_adroit("relocate", 39, 30),
        _kitchen("complete", 11, ("microwave", "kettle", "light switch", "slide cabinet")),
        _kitchen("mixed", 12, ("microwave", "kettle", "bottom burner", "light switch")),
        _kitchen("partial", 11, ("microwave", "kettle", "light switch", "slide cabinet")),
        _fetch("reach", "Reach", 10),
        _fetch("push", "Push", 25),
        _fetch("slide", "Slide", 25),
        _fetch("pick-and-place", "PickAndPlace", 25),
        TaskSpec("pusht", "pusht", "gym_pusht:gym_pusht/PushT-v0", 300, (), (("state", 5),), 2),
    )
}
