"""`report`: what it says of runs, also of those that are damaged, and that nothing breaks it."""

from __future__ import annotations

import json

import pytest
from pages import parsed
from PIL import Image
from test_compare import NAME, a_run

from diffusion_pl.cli import main
from diffusion_pl.training.history import History

HOSTILE = "<script>alert(1)</script><img src=x onerror=alert(1)>\"'&\x1b[31m\u202e"


def reported(*folders, words=("--no-draw",), code=0):
    """The page of a report of runs, parsed."""
    out = folders[0] / "out.html"
    assert main(["report", *map(str, folders), "--out", str(out), *words]) == code
    return parsed(out.read_text())


def cells(part):
    """The rows of a part's tables, as lists of texts."""
    return [
        [each.text for each in row.inside if not isinstance(each, str)] for row in part.find("tr")
    ]


def part(page, name):
    [found] = page.find("section", id=name)
    return found


def measured(folder, *rows):
    """Append rows of `evaluate`."""
    for row in rows:
        History(folder / "evaluations.jsonl", name=str).append(row)


def known(**more):
    row = {"images": 2000, "name": NAME, "value": 5.0, "n": 250, "first": 0, "seed": 3}
    row |= {"reference": "synthetic", "reference_n": 4096, "fingerprint": "0123456789abcdef"}
    row |= {"extractor": "shapes-1", "resize": "area to 32 px", "features": "fp32"}
    return row | {"weights": "ema", "ema": "EMA(half_life=1000)", "evaluations": 10, **more}


def test_a_number_answers_the_five_questions(tmp_path):
    folder = a_run(tmp_path / "a")
    measured(folder, known(), known(weights="denoiser", ema=None))
    page = reported(folder)
    cards = part(page, "questions").find("div", **{"class": "card"})
    answers = [dict(zip(*([e.text for e in card.find(n)] for n in ("dt", "dd")), strict=True))
               for card in cards]  # fmt: skip
    assert answers[0] | {"How sampled?": ""} == {
        "Which weights?": "averaged, EMA(half_life=1000)",
        "How many images?": "250 generated, from number 0 of seed 3",
        "Which extractor?": "shapes-1, fp32",
        "Which reference?": "synthetic, 4,096 real, 0123456789ab",
        "Which resizing and normalisation?": "area to 32 px",
        "How sampled?": "",
    }
    assert answers[1]["Which weights?"] == "raw"


def test_what_was_not_recorded_is_said(tmp_path):
    folder = a_run(tmp_path / "a")
    measured(folder, {"images": 2000, "name": NAME, "value": 5.0})
    answers = [each.text for each in part(reported(folder), "questions").find("dd")]
    assert answers == ["not recorded"] * 6


def test_settings_that_differ_are_marked(tmp_path):
    a = a_run(tmp_path / "a")
    b = a_run(tmp_path / "b", changes={"optimizer.lr": 1e-3})
    run = part(reported(a, b), "run")
    marked = {row.find("th")[0].text: [each.text for each in row.find("td")]
              for row in run.find("tr", **{"class": "differs"})}  # fmt: skip
    assert set(marked) == {"optimizer", "optimizer.lr"}
    assert marked["optimizer.lr"] == ["0.003", "0.001"]


def test_the_published_number_is_that_of_the_experiment_trained(tmp_path):
    from diffusion_pl import experiment

    folder = tmp_path / "cifar10_edm"
    folder.mkdir()
    (folder / "config.yaml").write_text(
        experiment("cifar10_edm").replace({"optimizer.lr": 0.5}).yaml
    )
    measured(folder, known())
    text = part(reported(folder), "numbers").text
    assert "FID 1.97 at 35 evaluations [Karras 2022, Table 2]" in text
    assert "differs from it in: optimizer.lr." in text
    assert "published: no experiment" in part(reported(a_run(tmp_path / "x", {1000: 5.0})),
                                              "numbers").text  # fmt: skip


def plots_of(section):
    """Title of each plot, what is on its x axis, and the runs in it."""
    return [
        (figure.find("figcaption")[0].text, figure.find("svg")[0].attributes["aria-label"],
         [each.text for each in figure.find("li")])
        for figure in section.find("figure")
    ]  # fmt: skip


def test_numbers_of_one_kind_share_axes_and_others_do_not(tmp_path):
    a = a_run(tmp_path / "a", {1000: 9.0, 2000: 5.0})
    b = a_run(tmp_path / "b", {1000: 8.0, 2000: 6.0})
    c = a_run(tmp_path / "c", {1000: 8.0, 2000: 6.0}, extractor="inception-1")
    page = reported(a, b, c)
    found = [(title, runs) for title, about, runs in plots_of(part(page, "curves"))
             if title.startswith("fd") and about.endswith("by images seen")]  # fmt: skip
    title = f"{NAME}, averaged weights"
    assert found == [(title, ["a", "b"]), (title, ["c"])]
    assert "c alone has" in part(page, "numbers").text
    losses = [runs for title, _, runs in plots_of(part(page, "curves")) if title == "training loss"]
    assert losses == [["a", "b", "c"]] * 2  # by images and by time


def test_losses_of_other_objectives_have_axes_of_their_own(tmp_path):
    a, b = a_run(tmp_path / "a"), a_run(tmp_path / "b", changes={"objective.P_mean": 0.5})
    curves = part(reported(a, b), "curves")
    losses = [runs for title, _, runs in plots_of(curves) if title == "training loss"]
    assert losses == [["a"], ["a"], ["b"], ["b"]]
    assert "Losses of other objectives" in curves.text


def test_time_is_that_of_training(tmp_path):
    a = a_run(tmp_path / "a", {1000: 9.0, 4000: 5.0}, speed=1 / 3.6)  # an hour a thousand images
    page = reported(a)
    [figure] = [each for each in part(page, "curves").find("figure")
                if each.find("svg")[0].attributes["aria-label"]
                == f"{NAME}, averaged weights by hours of training"]  # fmt: skip
    across = {each.text for each in figure.find("text", **{"text-anchor": "middle"})}
    assert {"1", "2", "3", "4"} <= across
    rows = dict(map(tuple, cells(part(page, "cost"))[1:]))
    assert rows["time of training"] == "4:00:00" and rows["images a second (median)"] == "0.2778"


def test_hours_of_devices_count_every_device_of_every_node(tmp_path):
    told = {}
    for devices, nodes in ((1, 1), (2, 1), (2, 3)):
        folder = a_run(
            tmp_path / f"{devices}-{nodes}", {1000: 9.0, 4000: 5.0}, speed=1 / 3.6,
            changes={"trainer.devices": devices, "trainer.nodes": nodes},
        )  # fmt: skip
        rows = dict(map(tuple, cells(part(reported(folder), "cost"))[1:]))
        [told[devices, nodes]] = [rows[name] for name in rows if "hours" in name]
    assert told == {(1, 1): "4", (2, 1): "8", (2, 3): "24"}


def test_a_number_measured_later_is_the_one_told(tmp_path):
    folder = a_run(tmp_path / "a", {1000: 9.0, 2000: 5.0})
    rows = [line for line in (folder / "metrics.jsonl").read_text().splitlines() if line]
    (folder / "metrics.jsonl").write_text("\n".join(reversed(rows)) + "\n")
    head, row, *_ = cells(part(reported(folder), "numbers"))
    told = dict(zip(head, row, strict=True))
    assert (told["value"], told["images seen"]) == ("5", "2,000")


def test_a_sweep_has_a_line_for_each_sampler(tmp_path):
    folder = a_run(tmp_path / "a")
    rows = History(folder / "sweep" / "rows.jsonl", point=str)
    for steps, value in ((5, 9.0), (10, 6.0)):
        for name in ("deis", "heun"):
            sampler = f"Sampler(integrate={name}, schedule=Rho(sigma_min=0.02), steps={steps})"
            rows.append({"point": f"{name}{steps}", **known(value=value, sampler=sampler)}
                        | {"evaluations": steps})  # fmt: skip
    [(_, about, lines)] = plots_of(part(reported(folder), "sweep"))
    assert about.endswith("by network evaluations an image") and lines == ["deis", "heun"]
    # Another metric has axes of its own.
    for steps in (5, 10):
        row = known(name="cs@250/synthetic/shapes", value=1.5, sampler="heun")
        rows.append({"point": f"cs{steps}", **row, "evaluations": steps})
    titles = [title for title, _, _ in plots_of(part(reported(folder), "sweep"))]
    assert [title[:3] for title in titles] == ["fd@", "cs@"]


def test_losses_by_level_are_plotted_where_they_were_measured(tmp_path):
    folder = a_run(tmp_path / "a")
    assert "not measured" in part(reported(folder), "levels").text
    level = [{"sigma": 0.1 * n, "loss": 1 / n} for n in range(1, 4)]
    said = {"data": "synthetic", "count": 64, "levels": {"ema": level, "denoiser": level}}
    (folder / "losses").mkdir()
    (folder / "losses" / "losses.json").write_text(json.dumps(said))
    section = part(reported(folder), "levels")
    assert [runs for _, _, runs in plots_of(section)] == [["averaged weights", "raw weights"]]
    assert "64 images of synthetic" in section.text


def test_grids_through_training_stand_under_a_slider(tmp_path):
    folder = a_run(tmp_path / "a")
    (folder / "samples").mkdir()
    for images in range(1, 41):
        Image.new("RGB", (20, 20), (images, 0, 0)).save(folder / "samples" / f"{images:012d}.png")
    (folder / "samples" / f"{50:012d}.png").write_bytes(b"no PNG")
    Image.new("RGB", (20, 20)).save(folder / "samples" / f"{10**39}.png")  # no number of images
    grids = part(reported(folder), "grids")
    [move] = grids.find("input")
    frames = [each.attributes["data-caption"] for each in grids.find("div") if
              "data-caption" in each.attributes]  # fmt: skip
    assert all(int(each.split()[0].replace(",", "")) <= 40 for each in frames)
    assert len(frames) == 23 and frames[0] == "1 images seen" and move.attributes["max"] == "22"
    assert "000000000050.png" in part(reported(folder), "grids").text  # said, not shown


def test_hostile_names_stay_text(tmp_path):
    folder = a_run(tmp_path / "<img src=x onerror=alert(1)>", changes={})
    (folder / "FAILED").write_text(HOSTILE)
    row = known(name=f"fd@250/{HOSTILE}/x", reference=HOSTILE, extractor=HOSTILE, sampler=HOSTILE,
                resize=HOSTILE, weights=HOSTILE, hardware=HOSTILE, time=HOSTILE, commit=HOSTILE,
                versions={HOSTILE: HOSTILE})  # fmt: skip
    measured(folder, row)
    for images in (1000, 2000):
        History(folder / "metrics.jsonl").measure(images, [{**row, "images": images}])
    rows = History(folder / "sweep" / "rows.jsonl", point=str)
    rows.append({"point": "x", **row})
    (folder / "run.json").write_text(json.dumps({"code": HOSTILE, "class_names": [HOSTILE]}))
    with (folder / "config.yaml").open("a") as file:
        file.write(f"noted: {json.dumps(HOSTILE)}\n")
    page = reported(folder)
    assert len(page.find("script")) == len(page.find("style")) == 1
    assert not any(key.startswith("on") or key == "src" for each in page.below()
                   for key in each.attributes)  # fmt: skip
    written = HOSTILE.replace("\x1b", r"\x1b").replace("\u202e", r"\u202e")
    for name in ("run", "questions", "numbers", "curves", "sweep", "environment"):
        assert written in part(page, name).text, name


def test_the_terminal_gets_no_control_characters(tmp_path, capsys):
    folder = a_run(tmp_path / "a")
    (folder / "run.json").write_text("[]")
    (folder / "metrics.jsonl").write_bytes(b"\x1b[31m\n" + (folder / "metrics.jsonl").read_bytes())
    reported(folder)
    assert "\x1b" not in capsys.readouterr().out


DAMAGED = {
    "metrics.jsonl": b'{"images": 1000, "loss": 1}\nno JSON\n{"images": "x"}\n{"images": 1e999}\n',
    "evaluations.jsonl": b'{"images": 1, "name": 5, "value": 1}\n{"images": 1}x\n\xff\n',
    "run.json": b"[1]",
    "sweep/rows.jsonl": b'{"name": "x@1", "value": "much"}\n',
    "losses/losses.json": b'{"levels": {"ema": [1, {"sigma": "x"}, {"sigma": -1, "loss": 2}]}}',
    "config.yaml": b"{[",
}


@pytest.mark.parametrize("file", DAMAGED)
def test_a_damaged_file_is_marked_and_the_rest_stands(tmp_path, file):
    folder = a_run(tmp_path / "a", {2000: 5.0})
    (folder / file).parent.mkdir(exist_ok=True)
    (folder / file).write_bytes(DAMAGED[file])
    page = reported(folder)
    problems = [each.text for each in page.find("p", **{"class": "problem"})]
    assert file == "losses/losses.json" or any(file.split("/")[-1] in text for text in problems)
    assert page.find("section", id="environment")
    if file == "metrics.jsonl":
        assert "3 of 4 lines are damaged" in problems[0]
        assert plots_of(part(page, "curves"))[0][0] == "training loss"
    else:
        assert NAME in part(page, "numbers").text


ODD = [
    {"images": 2000, "name": NAME, "value": float("nan"), "seconds": "x", "versions": 3},
    {"images": 2000, "name": NAME, "value": float("inf"), "blocks": ["a"], "fingerprint": [1]},
    {"images": 2000, "name": "", "value": 10**299, "n": 1.5, "sampler": {"a": 1}, "guidance": []},
    {"images": 3000, "loss": "x", "images_per_second": -1.0, "time": 7},
    {"images": 3000, "name": "x", "value": -1e308, "images_per_second": float("nan")},
    {"images": 3000, "name": "loss@1/x", "value": 1.0, "levels": "x", "which": [1], "weights": 3},
    {
        "images": 3000,
        "name": "loss@1/x",
        "value": 1.0,
        "levels": [{"sigma": "a"}, 1, {}],
        "weights": "ema",
        "standard_error": "y",
        "n": "z",
        "data": {},
    },
]


def test_odd_values_are_no_traceback(tmp_path):
    folder = a_run(tmp_path / "a")
    for name in ("metrics.jsonl", "evaluations.jsonl", "sweep/rows.jsonl"):
        (folder / name).parent.mkdir(exist_ok=True)
        with (folder / name).open("a") as file:
            file.writelines(json.dumps(row) + "\n" for row in ODD)
    assert reported(folder).find("section", id="environment")


def test_held_out_losses_are_drawn_by_level_and_are_no_numbers_of_samples(tmp_path):
    folder = a_run(tmp_path / "a", {2000: 5.0})
    for images in (1000, 2000):
        for weights, loss in (("ema", 0.5), ("denoiser", 0.6)):
            levels = [{"sigma": sigma, "loss": loss * 1000 / images} for sigma in (0.1, 1.0, 10.0)]
            row = {"images": images, "name": "loss@8/test", "value": loss, "standard_error": 0.01}
            row |= {"n": 8, "which": "8 of 100, evenly spaced", "held_out": True, "data": "test"}
            row |= {"levels": levels, "weights": weights, "fingerprint": "cd"}
            History(folder / "metrics.jsonl").append(row)
    page = reported(folder)
    drawn = plots_of(part(page, "levels"))
    assert {title.partition(": ")[2] for title, _, _ in drawn} == {
        "held-out loss by noise level, averaged weights",
        "error / (sigma² sd² / (sigma² + sd²))",
    }
    assert "sigma 0.1" in str(drawn) and "a: 8 images of test" in part(page, "levels").text
    curves = [title for title, _, _ in plots_of(part(page, "curves"))]
    assert curves.count("loss@8/test, averaged weights") == 2  # by images and by time
    assert curves.count("loss@8/test, raw weights") == 2
    text = part(page, "numbers").text
    assert "loss@8/test of averaged weights on 8 of 100, evenly spaced" in text
    assert "0.5 (standard error 0.01)" in text
    assert "loss@8/test" not in part(page, "questions").text


@pytest.mark.parametrize("state", ["begun", "older", "unmeasured"])
def test_unfinished_and_older_runs_are_told(tmp_path, state, capsys):
    folder = a_run(tmp_path / "a")
    if state == "begun":
        (folder / "metrics.jsonl").unlink()
    if state == "older":  # a former name of total_images
        text = (folder / "config.yaml").read_text()
        (folder / "config.yaml").write_text(text.replace("total_images:", "images:"))
    page = reported(folder)
    seen = "0" if state == "begun" else "2,000"
    rows = dict(map(tuple, cells(part(page, "run"))[1:3]))
    assert rows["images seen"] == f"{seen} of 4,000"
    assert rows["state"] == ("begun" if state == "begun" else "stopped")
    assert "No evaluation yet" in part(page, "numbers").text
    assert " evaluate " in capsys.readouterr().err.splitlines()[-1]


def test_what_is_no_run_is_one_line(tmp_path, capsys):
    assert main(["report", str(tmp_path), "--no-draw"]) == 2
    assert capsys.readouterr().err == f"error: {tmp_path}: there is no run here (no config.yaml)\n"
    folder = a_run(tmp_path / "a")
    assert main(["report", str(folder), str(folder), "--no-draw"]) == 2
    assert "named twice" in capsys.readouterr().err


def test_the_file_lies_in_the_run_s_folder_and_the_next_command_is_named(tmp_path, capsys):
    a, b = a_run(tmp_path / "a", {4000: 5.0}), a_run(tmp_path / "b", {4000: 5.0})
    assert main(["report", str(a), "--no-draw"]) == 0
    found = capsys.readouterr()
    assert json.loads(found.out)["report"] == str(a / "report.html")
    assert found.err.splitlines()[-1].startswith("next ")
    assert main(["report", str(a), str(b), "--no-draw"]) == 0
    found = capsys.readouterr()
    assert json.loads(found.out)["report"] == str(a / "compared.html")
    assert " compare " in found.err
