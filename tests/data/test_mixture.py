"""Mixtures that change: every source goes on where it was, shares are kept, sizes and bounds give the weights."""

import json

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import configs
from configs.typed import ConfigError, build, to_dict
from data import Balance, Mixture, Phase, Reading, make_batches, plan, write_dataset
from data.mixture import BatchSpec, Schedule, Size, make_schedule, sources_of
from data.plan import make_plan
from data.related import write_order
from data.shards import TokenRecord

T = 16
weights = st.lists(st.floats(1e-6, 1), min_size=1, max_size=6)


@st.composite
def schedules(draw):
    count = draw(st.integers(1, 6))
    phases = draw(st.integers(1, 4))
    starts = [0, *sorted(draw(st.sets(st.integers(1, 300), min_size=phases - 1, max_size=phases - 1)))]
    some = st.lists(st.one_of(st.just(0.0), st.floats(1e-4, 1)), min_size=count, max_size=count).filter(sum)
    shares = [draw(some) for _ in starts]
    return Schedule([str(i) for i in range(count)], starts, [[w / sum(s) for w in s] for s in shares])


@settings(max_examples=150, deadline=None)
@given(schedules())
def test_each_source_is_read_in_order_without_gap_or_repeat(schedule):
    next_of = [0] * len(schedule.sources)
    for g in range(500):
        assert schedule.counts(g) == next_of
        source, index = schedule.place(g)
        assert index == next_of[source]
        next_of[source] += 1


@settings(max_examples=150, deadline=None)
@given(schedules())
def test_no_source_is_ever_far_from_its_share(schedule):
    stops = [*schedule.starts[1:], 500]
    bound = (1 + np.ceil(np.log2(max(len(schedule.sources), 1)))) / 2 + 1e-6
    for start, stop, shares in zip(schedule.starts, stops, schedule.shares):
        drawn = np.zeros(len(shares))
        for g in range(start, stop):
            source, _ = schedule.place(g)
            assert shares[source] > 0
            drawn[source] += 1
            assert np.abs(drawn - np.array(shares) * (g + 1 - start)).max() <= bound


def test_a_far_example_is_exact():
    schedule = Schedule("abc", [0, 10**13], [[0.5, 0.3, 0.2], [0.1, 0.2, 0.7]])
    far = 10**15
    counts = schedule.counts(far)
    assert sum(counts) == far
    for g in range(far, far + 200):
        source, index = schedule.place(g)
        assert index == counts[source]
        counts[source] += 1
    np.testing.assert_allclose(np.array(counts) / far, [0.104, 0.201, 0.695], atol=1e-6)


def test_a_mixture_takes_over_at_a_step_or_a_part_of_the_run():
    sizes = {"a": Size(10, 100), "b": Size(10, 100)}
    phases = (Phase({"a": 3, "b": 1}), Phase({"a": 1, "b": 1}, 10), Phase({"b": 1}, 0.9))
    schedule = make_schedule(Mixture(phases), sizes, 4, steps=100)
    assert schedule.starts == (0, 40, 360)
    assert schedule.counts(40) == [30, 10] and schedule.counts(360) == [190, 170]
    assert schedule.counts(400) == [190, 210]
    with pytest.raises(ConfigError, match="give steps"):
        make_schedule(Mixture(phases), sizes, 4)
    with pytest.raises(ConfigError, match="wanted 0 first"):
        make_schedule(Mixture(phases), sizes, 4, steps=11)
    for start in (-1, 1.0, 1.5):
        with pytest.raises(ConfigError, match="wanted a step"):
            Phase({"a": 1}, start)


def test_temperature_flattens_shares_by_size():
    sizes = {"a": Size(100, 8100), "b": Size(1, 100)}
    mixture = Mixture((Phase({"a": 1, "b": 1}),), Balance(temperature=1))
    assert make_schedule(mixture, sizes, 1).shares[0] == pytest.approx((81 / 82, 1 / 82))
    mixture = Mixture((Phase({"a": 1, "b": 1}),), Balance(temperature=2))
    assert make_schedule(mixture, sizes, 1).shares[0] == pytest.approx((0.9, 0.1))
    mixture = Mixture((Phase({"a": 1, "b": 2}),), Balance(temperature=2))
    assert make_schedule(mixture, sizes, 1).shares[0] == pytest.approx((9 / 11, 2 / 11))


@settings(max_examples=100, deadline=None)
@given(
    weights=weights,
    rows=st.lists(st.integers(1, 200), min_size=6, max_size=6),
    max_epochs=st.floats(0.5, 8),
    steps=st.integers(1, 400),
    change=st.integers(0, 400),
)
def test_no_source_is_repeated_beyond_the_bound(weights, rows, max_epochs, steps, change):
    sizes = {str(i): Size(rows[i], rows[i] * T) for i in range(len(weights))}
    given_ = {str(i): w for i, w in enumerate(weights)}
    phases = [Phase(given_)]
    if 0 < change < steps:
        phases.append(Phase(dict(zip(given_, reversed(weights))), change))
    mixture = Mixture(tuple(phases), Balance(max_epochs=max_epochs))
    room = max_epochs * sum(rows[: len(weights)])
    if room < steps * (1 - 1e-9):
        with pytest.raises(ConfigError, match="max_epochs"):
            make_schedule(mixture, sizes, 1, steps)
        return
    schedule = make_schedule(mixture, sizes, 1, steps)
    counts = schedule.counts(steps)
    slack = len(phases) * 4  # whole examples
    assert all(n <= max_epochs * size.examples + slack for n, size in zip(counts, sizes.values()))
    free = [i for i, n in enumerate(counts) if n < 0.9 * max_epochs * rows[i] - slack]
    if len(phases) == 1 and len(free) > 1:  # those below the bound keep their proportions
        shares = schedule.shares[0]
        ratios = [shares[i] / weights[i] for i in free]
        np.testing.assert_allclose(ratios, ratios[0], rtol=1e-9)


def test_the_config_of_a_mixture_survives_being_written():
    spec = BatchSpec({"a": 1.0}, (Phase({"b": 1.0}, 0.5), Phase({"a": 2.0}, 700)), Balance(1.5, 4.0))
    assert build(BatchSpec, to_dict(spec)) == spec
    assert build(BatchSpec, to_dict(spec)).phases[1].start == 700
    assert sources_of(spec.whole_mixture()) == ["a", "b"]


def documents(n, first, seed, high=40):
    """Documents whose tokens are all different, so that every token can be followed."""
    records, start = [], first
    for size in np.random.default_rng(seed).integers(2, high, n):
        records.append(TokenRecord(np.arange(start, start + size, dtype=np.int32)))
        start += size
    return records


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    folder = tmp_path_factory.mktemp("mixture")
    for i, name in enumerate("abc"):
        count = 25 + 5 * i
        write_dataset(folder / name, documents(count, 10_000 * (i + 1), i), "tokens")
        write_order(folder / name, np.random.default_rng(i).permutation(count))
    return folder


def phased(folders):
    a, b, c = (str(folders / name) for name in "abc")
    return Mixture((Phase({a: 2, b: 1}), Phase({a: 1, b: 1, c: 2}, 4), Phase({c: 1}, 0.75)))


@settings(max_examples=8, deadline=None)
@given(
    cuts=st.lists(st.integers(0, 12), max_size=3).map(sorted),
    hosts=st.lists(st.sampled_from([1, 2, 4]), min_size=4, max_size=4),
    packing=st.sampled_from(["concat", "best_fit", "related"]),
)
def test_a_run_cut_anywhere_goes_on_exactly_on_other_hosts(folders, cuts, hosts, packing):
    def steps_of(first, last, count):
        parts = [
            make_batches(
                phased(folders), 8, T, 3, Reading(packing=packing, num_threads=0),
                steps=12, start=8 * first, process_index=p, process_count=count,
            )
            for p in range(count)
        ]  # fmt: skip
        for _ in range(first, last):
            rows = [next(part) for part in parts]
            yield {key: np.concatenate([row[key] for row in rows]) for key in rows[0]}

    whole = list(steps_of(0, 12, 1))
    edges = [0, *cuts, 12]
    pieces = [steps_of(a, b, count) for a, b, count in zip(edges, edges[1:], hosts)]
    for wanted, got in zip(whole, (step for piece in pieces for step in piece), strict=True):
        for key in wanted:
            np.testing.assert_array_equal(got[key], wanted[key], err_msg=key)


@pytest.mark.parametrize("packing", ["concat", "best_fit", "related"])
def test_a_source_repeats_nothing_before_its_epoch_is_over_though_the_mixture_changes(folders, packing):
    batches = make_batches(phased(folders), 8, T, 3, Reading(packing=packing), steps=12)
    seen = {name: [] for name in "abc"}
    for _ in range(12):
        batch = next(batches)
        for row, segments in zip(batch["tokens"], batch["segment_ids"]):
            name = "abc"[int(row[0]) // 10_000 - 1]
            seen[name].append(row[segments > 0])
    for name, size in zip("abc", batches.opened.sizes.values()):
        epoch = np.concatenate(seen[name][: size.examples])
        assert len(np.unique(epoch)) == len(epoch)  # nothing twice within an epoch
        if len(seen[name]) >= size.examples:
            assert len(epoch) == size.tokens  # and nothing lost


def test_the_plan_adds_up_to_what_is_drawn(folders):
    batches = make_batches(phased(folders), 8, T, 3, steps=12)
    planned = make_plan(batches.opened, 8, 12)
    drawn = {str(folders / name): 0 for name in "abc"}
    by_phase = {1: 0, 2: 0, 3: 0}
    for step in range(12):
        for row in next(batches)["tokens"]:
            drawn[str(folders / "abc"[int(row[0]) // 10_000 - 1])] += 1
            by_phase[1 + (step >= 4) + (step >= 9)] += 1
    for folder, rows in drawn.items():
        draws = [d for d in planned.draws if d.source == folder]
        assert sum(d.examples for d in draws) == rows
        assert draws[-1].epochs == pytest.approx(rows / batches.opened.sizes[folder].examples)
    assert {p: sum(d.examples for d in planned.draws if d.phase == p) for p in by_phase} == by_phase
    assert [d.start for d in planned.draws] == [0, 0, 4, 4, 4, 9]
    often = make_plan(batches.opened, 8, 100, max_epochs=2)
    assert any("repeated" in line and str(folders / "c") in line for line in often.warnings())
    assert str(folders / "a") in planned.table() and "padding" in planned.table()


def test_the_plan_is_printed_by_a_command(folders, tmp_path, capsys):
    a, b = str(folders / "a"), str(folders / "b")
    spec = BatchSpec({a: 3.0, b: 1.0}, (Phase({b: 1.0}, 0.5),), seq_len=T, batch_size=4)
    config = tmp_path / "plan.json"
    config.write_text(json.dumps({"data": to_dict(spec), "steps": 100}))
    assert configs.run(plan.main, plan.PlanConfig, [f"--config={config}"], workdir_required=False) == 0
    lines = [" ".join(line.split()) for line in capsys.readouterr().out.splitlines()]
    tokens = [int(np.load(folders / name / "lengths.npy").sum()) for name in "ab"]
    rows = [-(-n // T) for n in tokens]
    share = round(150 * tokens[0] / rows[0])
    assert lines[1] == f"1 0 {a} 25 {tokens[0]:,} 75.00% {share:,} {150 / rows[0]:.2f}"
    assert lines[3].startswith(f"2 50 {b} 30 {tokens[1]:,} 100.00%")
    assert lines[3].endswith(f" {250 / rows[1]:.2f}") and f"warning: {b} is repeated" in lines[-1]


def test_the_plan_says_which_dialogues_do_not_fit(tmp_path):
    records = [TokenRecord(np.arange(n), np.ones(n, bool)) for n in (5, 40, 7, 50)]
    write_dataset(tmp_path / "chat", records, "chat")
    batches = make_batches({tmp_path / "chat": 1}, 2, T, 0)
    planned = make_plan(batches.opened, 2, 1)
    assert planned.draws[0].tokens == 12
    said = f"2 of {planned.draws[0].documents} records of {tmp_path / 'chat'} are longer than a row and left out: raise"
    assert said in planned.table() and "cut off" not in planned.table()
