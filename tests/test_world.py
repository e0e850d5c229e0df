"""The miniature world: exact geometry, balanced questions, and nothing to be learned without seeing."""

import json
from dataclasses import replace

import numpy as np
import pytest

from ola_vlm import cli
from ola_vlm.recipes import RECIPES
from ola_vlm.world import dataset, language, render


def one_object(shape: str, u: float, v: float, z: float, r: float) -> render.Scenes:
    """A scene with one red object; the other slots are empty."""
    scenes = render.sample_scenes(1, seed=0)
    scenes.color[:] = -1
    scenes.color[0, 0], scenes.shape[0, 0] = 0, render.SHAPES.index(shape)
    scenes.u[0, 0], scenes.v[0, 0], scenes.z[0, 0], scenes.r[0, 0], scenes.yaw[0, 0] = u, v, z, r, 0.0
    return scenes


def test_ball_depth_is_exact():
    scenes = one_object("ball", u=0.1, v=0.1, z=5.0, r=0.12)
    arrays = render.render_scenes(scenes)
    column, row = int((0.1 + 0.5) * render.SIZE), int((render.HORIZON - 0.1) * render.SIZE)
    x, y = (column + 0.5) / render.SIZE - 0.5, render.HORIZON - (row + 0.5) / render.SIZE
    d, center, radius = np.array([x, y, 1.0]), np.array([0.5, 0.5, 5.0]), 0.6
    b, c = d @ center, center @ center - radius**2
    assert arrays["depth"][0, row, column] == pytest.approx((b - np.sqrt(b * b - d @ d * c)) / (d @ d), rel=1e-5)
    assert arrays["mask"][0, row, column] == render.CLASSES.index("red")


@pytest.mark.parametrize("shape", render.SHAPES)
def test_apparent_size_does_not_depend_on_depth(shape):
    areas = [render.render_scenes(one_object(shape, 0.0, 0.1, z, 0.12))["visible"][0, 0] for z in (4.0, 8.0)]
    assert areas[0] == pytest.approx(areas[1], rel=0.08)
    assert areas[0] > 60


def test_nearer_object_hides_the_farther_and_haze_pales_it():
    scenes = one_object("ball", 0.0, 0.1, 4.0, 0.1)
    scenes.color[0, 1], scenes.shape[0, 1] = 1, 0
    for name, value in {"u": 0.05, "v": 0.1, "z": 8.0, "r": 0.1}.items():
        getattr(scenes, name)[0, 1] = value
    arrays = render.render_scenes(scenes)
    row, red, both = int(0.2 * render.SIZE), int(0.46 * render.SIZE), int(0.52 * render.SIZE)
    assert arrays["mask"][0, row, both] == arrays["mask"][0, row, red] == render.CLASSES.index("red")
    near, far = one_object("ball", 0.0, 0.1, 4.0, 0.1), one_object("ball", 0.0, 0.1, 9.0, 0.1)
    colors = [render.render_scenes(s)["image"][0, row, 32].astype(int) for s in (near, far)]
    haze = 255 * near.haze[0, :3]
    assert np.abs(colors[1] - haze).sum() < np.abs(colors[0] - haze).sum()


def test_ground_depth_and_sky():
    arrays = render.render_scenes(one_object("cube", 0.3, 0.2, 6.0, 0.08))
    bottom = -(render.HORIZON - (render.SIZE - 0.5) / render.SIZE)
    assert arrays["depth"][0, -1, 0] == pytest.approx(render.CAMERA_HEIGHT / bottom, rel=1e-5)
    assert arrays["depth"][0, 0, 0] == render.SKY
    assert arrays["mask"][0, 0, 0] == render.CLASSES.index("sky")
    assert arrays["mask"][0, -1, 0] == render.CLASSES.index("floor")


def test_answers_follow_the_scene():
    scenes = render.sample_scenes(60, seed=4)
    position, names = scenes.position(), list(render.COLORS)
    for i in range(len(scenes)):
        slot = {names[c]: k for k, c in enumerate(scenes.color[i]) if c >= 0}
        for q in language.questions(scenes, i):
            right = q["choices"]["ABCD".index(q["answer"][1])]
            words = q["question"].split()
            if q["task"] == "relation":
                first, second = slot[words[3]], slot[words[9]]
                u, v = scenes.u[i], scenes.v[i]
                holds = {
                    "left": u[first] < u[second],
                    "right": u[first] > u[second],
                    "above": v[first] > v[second],
                    "below": v[first] < v[second],
                }
                assert holds[right]
            elif q["task"] == "depth":
                other = next(c for c in q["choices"] if c != right)
                assert position[i, slot[right.split()[0]], 2] < position[i, slot[other.split()[0]], 2]
            elif q["task"] == "distance":
                anchor = position[i, slot[words[6]]]
                other = next(c for c in q["choices"] if c != right)
                near, far = (np.linalg.norm(anchor - position[i, slot[c.split()[0]]]) for c in (right, other))
                assert near < far
            else:
                shape = words[2].removesuffix("s")
                count = (scenes.shape[i][scenes.color[i] >= 0] == render.SHAPES.index(shape)).sum()
                assert right == str(count)


def test_every_text_has_its_answers_equally_often():
    rows = language.balanced(render.sample_scenes(500, seed=3), per_task=48, seed=0)
    for task in language.TASKS:
        of_task = [q for q in rows if q["task"] == task]
        assert len({q["scene"] for q in of_task}) == len(of_task) == 48
        counts: dict[str, list[str]] = {}
        for q in of_task:
            counts.setdefault(q["question"], []).append(q["answer"])
        for answers in counts.values():
            assert len({answers.count(a) for a in answers}) == 1
    with pytest.raises(ValueError, match="too few scenes"):
        language.balanced(render.sample_scenes(20, seed=3), per_task=48, seed=0)


@pytest.mark.parametrize(
    ("count", "per_task", "message"),
    [
        (320, 20, "20 relation questions can't be balanced: there are 24 texts with their answers, so ask for 24"),
        (0, 48, r"too few scenes \(0\) for 48 balanced count questions"),
        (4, 24, r"too few scenes \(4\)"),
    ],
)
def test_no_task_is_left_out_of_balanced_questions(count, per_task, message):
    with pytest.raises(ValueError, match=message):
        language.balanced(render.sample_scenes(count, seed=104), per_task=per_task, seed=0)


def test_a_text_whose_other_answer_never_occurs_is_too_few_scenes(monkeypatch):
    """Who asks it would tell its answer."""
    asked = []
    for n, task in enumerate(4 * language.TASKS):
        answer = "(A)" if task == "depth" else f"({'AB'[n // 4 % 2]})"
        asked.append({"task": task, "question": f"which {task} ?", "choices": ["a", "b"], "answer": answer})
    monkeypatch.setattr(language, "questions", lambda scenes, i, differences: [asked[i]])
    with pytest.raises(ValueError, match="balanced depth questions"):
        language.balanced(range(len(asked)), per_task=2, seed=0)


def test_patches_tell_what_the_picture_shows_there():
    scenes, arrays = render.make_scenes(40, seed=4)
    side, right, told = render.SIZE // render.GRID, 0, 0
    for i in range(len(scenes)):
        patches = language.patches(scenes, i, np.random.default_rng(i), places=False)
        assert len(patches) == render.GRID**2
        assert not any(word[0] in "xy" and word[1:].isdigit() for words in patches for word in words)
        for p, (color, *_) in enumerate(patches):
            row, column = side * (p // render.GRID), side * (p % render.GRID)
            shown = arrays["mask"][i, row : row + side, column : column + side]
            right += color != "." and (shown == render.CLASSES.index(color)).mean() > 0.1
            told += color != "."
    assert right / told > 0.95
    assert told > 3 * len(scenes)
    placed = [words for words in language.patches(scenes, 0, np.random.default_rng(0), places=True) if len(words) > 1]
    known = {tuple(language.coordinates(scenes, 0, k)[:2]) for k in range(render.SLOTS)}
    assert {tuple(words[-2:]) for words in placed} <= known


def test_same_seed_same_world_other_seed_another():
    first, again, other = (render.render_scenes(render.sample_scenes(3, seed), seed)["image"] for seed in (5, 5, 6))
    assert (first == again).all()
    assert (first != other).any()


def test_no_split_shows_another_ones_scenes():
    """Of one seed, splits of one size would be the same scenes: models would be tested on what they learned from."""
    assert len(set(dataset.SEEDS.values())) == len(dataset.SEEDS) == len(dataset.SIZES)
    scenes = [render.sample_scenes(4, seed).z for seed in dataset.SEEDS.values()]
    assert len({depth.tobytes() for depth in scenes}) == len(scenes)


def test_questions_are_drawn_by_the_seed():
    scenes = render.sample_scenes(500, seed=3)
    drawn = [[q["scene"] for q in language.balanced(scenes, per_task=24, seed=seed)] for seed in (0, 0, 1)]
    assert drawn[0] == drawn[1] != drawn[2]


def test_world_on_disk_is_llava_data(tmp_path):
    sizes, questions = {"train": 40, "test": 320}, {"test": 48}
    checks = dataset.write_world(tmp_path, sizes, questions)
    for task in language.TASKS:
        assert checks["text_only"][task] == pytest.approx(language.CHANCE[task], abs=0.02)
    rows = json.loads((tmp_path / "finetune.json").read_text())
    assert len(rows) == 40
    for row in rows:
        assert (tmp_path / "images" / row["image"]).exists()
        assert row["conversations"][0]["value"].startswith("<image>\n")
        assert [turn["from"] for turn in row["conversations"]] == ["human", "gpt"] * (len(row["conversations"]) // 2)
    assert len(json.loads((tmp_path / "test_questions.json").read_text())) == 4 * 48
    assert (tmp_path / "contact_sheet.png").stat().st_size > 10_000
    stamp = (tmp_path / "images" / "train_00000.png").stat().st_mtime_ns
    assert dataset.write_world(tmp_path, sizes, questions) == checks
    assert (tmp_path / "images" / "train_00000.png").stat().st_mtime_ns == stamp
    with pytest.raises(ValueError, match="a world of another size or of other questions"):
        dataset.write_world(tmp_path, {"train": 20, "test": 320}, questions)


@pytest.mark.parametrize("content", ["{", "[]", "{}"])
def test_a_damaged_record_counts_as_none(tmp_path, monkeypatch, content):
    class BeginsAnew(Exception):
        pass

    def make_scenes(*args, **options):
        raise BeginsAnew

    monkeypatch.setattr(dataset.render, "make_scenes", make_scenes)
    (tmp_path / "world.json").write_text(content)
    with pytest.raises(BeginsAnew):
        dataset.write_world(tmp_path, {"train": 1}, {"train": 1})


def test_what_needs_no_image_is_measured_on_test_scenes(tmp_path, monkeypatch):
    """By a reader of positions that is fitted on training scenes, which it would know better."""
    scenes = {}
    for split, (count, seed) in {"train": (40, 1), "test": (10, 2)}.items():
        scenes[split] = render.sample_scenes(count, seed)
        mask = render.render_scenes(scenes[split], seed)["mask"]
        render.save_scenes(tmp_path / f"{split}.safetensors", scenes[split], {"mask": mask})
    asked = []
    for i in range(10):
        asked += [{"scene": i, **question} for question in language.questions(scenes["test"], i)]
    (tmp_path / "test_questions.json").write_text(json.dumps(asked))
    seen = {"fit": [], "score": []}

    class Reader:
        def __init__(self, *steps):
            pass

        def fit(self, features, answers):
            seen["fit"].append((len(features), len(answers)))

        def score(self, features, answers):
            seen["score"].append((len(features), len(answers)))
            return len(answers)

    monkeypatch.setattr(dataset, "make_pipeline", Reader)
    checks = dataset.check(tmp_path, scenes)
    counts = {task: sum(question["task"] == task for question in asked) for task in ("depth", "distance")}
    assert checks["position_size"] == checks["position_size_pairs"] == counts
    assert min(seen["fit"]) > max(seen["score"])
    assert all(features == answers for pairs in seen.values() for features, answers in pairs)


def test_where_a_color_is_seen():
    """Column, row and size of a red object alone, left of the middle and in the upper half."""
    scenes = one_object("ball", u=-0.2, v=0.1, z=5.0, r=0.1)
    column, row, size = dataset.referents(scenes, render.render_scenes(scenes))[0, render.REFERENTS.index("red")]
    assert column == pytest.approx(0.3, abs=0.02) and row == pytest.approx(render.HORIZON - 0.1, abs=0.02)
    assert size == pytest.approx(0.1 * np.pi**0.5, rel=0.15)


def test_questions_of_their_own_are_the_studys(tmp_path, monkeypatch):
    """Of its test scenes, drawn as it draws them."""
    drawn = []

    def make_scenes(count: int, seed: int, desc: str):
        drawn.append((count, seed))
        return "scenes", {}

    def balanced(scenes, per_task: int, seed: int):
        drawn.append((scenes, per_task, seed))
        return []

    monkeypatch.setattr(render, "make_scenes", make_scenes)
    monkeypatch.setattr(language, "balanced", balanced)
    dataset.write_questions(tmp_path)
    seed = dataset.SEEDS["test"]
    assert drawn == [(dataset.SIZES["test"], seed), ("scenes", dataset.QUESTIONS["test"], seed)]


def test_chats_ask_what_is_to_be_learned_in_an_order_of_their_own():
    """Of each scene anew, and not only about the small differences that tests ask about."""
    scenes, rng = render.sample_scenes(40, seed=3), np.random.default_rng(0)
    orders = set()
    captions = []
    easy = 0
    for i in range(len(scenes)):
        chat = language.conversation(scenes, i, dataset.TURNS, rng)
        orders.add(tuple(turn["task"] for turn in chat))
        of_tests = [question["question"] for question in language.questions(scenes, i, language.ASKED)]
        asked = [turn["question"] for turn in chat if turn["task"] in ("relation", "depth", "distance")]
        easy += sum(question not in of_tests for question in asked)
        captions.append([language.caption(scenes, i, rng) for _ in range(4)])
    assert len(orders) > 30 and easy > 40
    assert sum(len(set(of_scene)) > 1 for of_scene in captions) > 30  # its objects in any order


def test_each_scenes_rows_are_drawn_anew(tmp_path, monkeypatch):
    """By one generator for all: of one that begins again, every scene would be told of and asked about alike."""
    drawn = []

    def caption(scenes, i, rng):
        drawn.append(rng.random())
        return "a cube"

    def conversation(scenes, i, turns, rng):
        drawn.append(rng.random())
        return [{"question": "what ?", "answer": "a cube"}]

    monkeypatch.setattr(language, "caption", caption)
    monkeypatch.setattr(language, "conversation", conversation)
    dataset._write_training_rows(tmp_path, render.sample_scenes(5, seed=3))
    assert len(set(drawn)) == len(drawn) == 10


def test_most_distances_that_the_image_tells_are_not_asked_about():
    """Which of two is closer to a third: all those are asked about in which the image misleads."""
    scenes = render.sample_scenes(200, seed=3)
    position = scenes.position()
    seen = np.stack([scenes.u, scenes.v], axis=-1)
    least, _ = language.LEARNED.distance
    asked_of = {True: [], False: []}
    for i in range(len(scenes)):
        asked = {question["question"] for question in language.questions(scenes, i) if question["task"] == "distance"}
        for anchor, color in enumerate(("red", "blue", "green")):  # a scene's first three objects
            others = [slot for slot in range(3) if slot != anchor]
            in_space = [np.linalg.norm(position[i, anchor] - position[i, other]) for other in others]
            in_image = [np.linalg.norm(seen[i, anchor] - seen[i, other]) for other in others]
            if max(in_space) > least * min(in_space):
                is_as_seen = np.argmin(in_space) == np.argmin(in_image)
                asked_of[bool(is_as_seen)].append(f"which object is closer to the {color} object" in " ".join(asked))
    assert all(asked_of[False]) and len(asked_of[False]) > 30
    assert 0.2 < np.mean(asked_of[True]) < 0.4


def test_the_command_makes_what_recipes_read(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    cli.main(["data", "miniature", "--shrunk"])
    said = capsys.readouterr()
    assert "train            48 images" in said.out
    assert "Next: ola-vlm check-data --recipe miniature_pretrain\n" in said.err
    for stage in ("pretrain", "finetune"):
        fields = RECIPES[f"miniature_{stage}"]()
        rows = json.loads((tmp_path / fields["data"]).read_text())
        assert len(rows) == 48 and all((tmp_path / fields["image_folder"] / row["image"]).is_file() for row in rows)
    written = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")}
    cli.main(["data", "miniature", "--shrunk"])  # nothing is done again
    assert {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")} == written
    with pytest.raises(
        SystemExit, match=r"ola-vlm data: .* has a world of another size or of other questions: choose another"
    ):
        cli.main(["data", "miniature"])


def test_tests_ask_about_small_differences_only():
    """Larger ones are told right by any method, so that none could be better."""
    scenes = render.sample_scenes(900, seed=3)
    position = scenes.position()
    column_of = {"red": 0, "blue": 1, "green": 2}  # a scene's first three objects
    asked = {"relation": [], "depth": [], "distance": []}
    for row in language.balanced(scenes, per_task=96, seed=0):
        i = row["scene"]
        named = [column_of[word] for word in row["question"].split() if word in column_of]
        if row["task"] == "relation":
            axis = scenes.u if "left" in row["choices"] else scenes.v
            asked["relation"].append(abs(axis[i, named[0]] - axis[i, named[1]]))
        elif row["task"] == "depth":
            near, far = sorted(scenes.z[i, named])
            asked["depth"].append(far / near)
        elif row["task"] == "distance":
            anchor, *others = named
            near, far = sorted(np.linalg.norm(position[i, anchor] - position[i, other]) for other in others)
            asked["distance"].append(far / near)
    for kind, within in {"relation": (0.05, 0.16), "depth": (1.06, 1.3), "distance": (1.3, 2.0)}.items():
        assert len(asked[kind]) > 80
        assert within[0] < min(asked[kind]) and max(asked[kind]) < within[1], kind


@pytest.mark.slow
def test_a_world_of_other_questions_is_another_one(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    cli.main(["data", "miniature", "--shrunk"])
    before = (tmp_path / "runs/miniature/data/test_questions.json").read_bytes()
    monkeypatch.setattr(language, "ASKED", replace(language.ASKED, relation=(0.08, 0.3)))
    with pytest.raises(SystemExit, match="of other questions: choose another --out"):
        cli.main(["data", "miniature", "--shrunk"])
    assert (tmp_path / "runs/miniature/data/test_questions.json").read_bytes() == before
    dataset.write_world(tmp_path / "other", dataset.SHRUNK_SIZES, dataset.SHRUNK_QUESTIONS)
    assert (tmp_path / "other/test_questions.json").read_bytes() != before
