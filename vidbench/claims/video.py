"""Claims about pooling, fusion, optical flow and 3D convolution."""

from __future__ import annotations

from vidbench.claims import Claim, Plot, Prediction, per_seed
from vidbench.claims.protocols import (
    AMPLITUDE_PLOT,
    AMPLITUDE_STEPS,
    BOTH,
    CLEARLY,
    FACTORISED,
    LONG_KERNEL,
    MATTERS,
    PERCENT,
    POINTS,
    SPATIAL,
    TEMPORAL,
    TWO_RATES,
    Effect,
    Size,
    coarser,
    difference,
    experiments,
    named,
    reaches,
    streams,
)


def pooling_loses_order(size: Size) -> Claim:
    pools = {"frame_pool_avg": "average", "frame_pool_max": "max"}
    return Claim(
        name="pooling_loses_order",
        says="Pooling the features of frames over time loses temporal information.",
        source="Ng et al. (2015), arXiv:1503.08909, §3.2: pooled representations are order invariant",
        protocol="Average and max pooling against an LSTM over the same 2D CNN, on the order of three events. "
        "Every class shows the very same frames, so pools are at chance by construction; whether order can be read "
        "at all is what the LSTM shows, and appearance that the pools were trained well enough.",
        experiments=(
            *experiments("trial", size, (*pools, "cnn_lstm"), 200, task="frame_order"),
            *experiments("trial", size, tuple(pools), 200, task="appearance"),
        ),
        predictions=tuple(
            Prediction(
                f"an LSTM is more accurate than {words} pooling",
                POINTS,
                CLEARLY,
                difference(named("cnn_lstm"), named(pool), task="frame_order"),
            )
            for pool, words in pools.items()
        ),
        controls=(
            reaches("an LSTM reads the order", 90, model="cnn_lstm", task="frame_order"),
            *(
                reaches(f"{words} pooling reaches 85 % on appearance", 85, model=pool, task="appearance")
                for pool, words in pools.items()
            ),
        ),
        plot=Plot("task", "top1", "model", "", "top-1 accuracy", percent=True),
    )


def _favours_salient(size: Size, pool: str, words: str) -> Claim:
    def share_of(value: str, share: float) -> Effect:
        return lambda table: [100 * one for one in per_seed(table, value, model=pool, share=share)]

    return Claim(
        name=f"{words}_pooling_favours_salient_frames",
        says=f"{words.capitalize()} pooling favours salient frames.",
        source="lecture notes on video classification",
        protocol="A clip shows one shape strongly in half of its sixteen frames and another one faintly in the other "
        "half. Salient frames are favoured where their shape is answered more often than the other one. Both kinds of "
        "clip were trained on, each by itself, and both shapes by themselves must be recognised. (A run before this "
        "one asked that four salient frames outvote twelve others, which is more than the sentence says.)",
        experiments=experiments("salience", size, (pool,), 400, strong=256, faint=160),
        predictions=(
            Prediction(
                f"{words} pooling answers the salient half rather than the other", PERCENT, 50.0 + MATTERS,
                share_of("preference", 0.5),
            ),
        ),
        controls=(
            Prediction(f"{words} pooling recognises strong shapes", PERCENT, 80.0, share_of("salient", 1.0)),
            Prediction(f"{words} pooling recognises faint shapes", PERCENT, 80.0, share_of("faint", 0.0)),
        ),
        plot=Plot(
            "share", "preference", "model", "share of salient frames", "answers that are the salient shape",
            percent=True, level=0.5,
        ),
    )  # fmt: skip


def average_pooling_salient(size: Size) -> Claim:
    return _favours_salient(size, "frame_pool_avg", "average")


def max_pooling_salient(size: Size) -> Claim:
    return _favours_salient(size, "frame_pool_max", "max")


def conv3d_reads_order(size: Size) -> Claim:
    tasks = ("frame_order", "time_direction")
    return Claim(
        name="conv3d_beats_pooling_on_order",
        says="3D convolution models motion and order, which pooling over 2D features does not.",
        source="Tran et al. (2015), arXiv:1412.0767, §3.1",
        protocol="C3D against the average over a 2D CNN's frames, which is at chance by construction, on the order "
        "of three events and on the direction of time; that the pool was trained well enough is seen on appearance.",
        experiments=(
            *(one for task in tasks for one in experiments("trial", size, ("frame_pool_avg", "c3d"), 200, task=task)),
            *experiments("trial", size, ("frame_pool_avg",), 200, task="appearance"),
        ),
        predictions=tuple(
            Prediction(
                f"C3D is more accurate than average pooling on {task}",
                POINTS,
                CLEARLY,
                difference(named("c3d"), named("frame_pool_avg"), task=task),
            )
            for task in tasks
        ),
        controls=(
            reaches("average pooling reaches 85 % on appearance", 85, model="frame_pool_avg", task="appearance"),
        ),
        plot=Plot("task", "top1", "model", "", "top-1 accuracy", percent=True),
    )


def rigid_kernels(size: Size) -> Claim:
    names = {"c3d": "C3D", LONG_KERNEL: "C3D with a long first kernel"}
    return Claim(
        name="rigid_kernels_miss_subtle_motion",
        says="The rigid 3×3×3 kernel of 3D networks misses subtle motion.",
        source="lecture notes on video classification",
        protocol="Which way a texture moves, by a 64th of a pixel to eight in all: the amplitude at which "
        "accuracy passes 75 %, of C3D, and of C3D whose first kernel extends over eleven frames instead of three. "
        "The first half of the training shows the largest motion alone.",
        experiments=experiments("amplitude", size, tuple(names), AMPLITUDE_STEPS, pattern="texture"),
        predictions=(coarser("C3D needs larger motions with the 3×3×3 kernel", "c3d", LONG_KERNEL),),
        plot=AMPLITUDE_PLOT,
        controls=tuple(
            reaches(f"{words} tells the largest motion", 85, model=name, amplitude=8.0) for name, words in names.items()
        ),
    )


def flow_is_short_term(size: Size) -> Claim:
    near, far = "motion_order", "motion_order:clip_length=48:delay=10:margin=10"
    return Claim(
        name="flow_is_short_term",
        says="Optical flow captures short-term motion only.",
        source="Wang et al. (2016), arXiv:1608.00859, §1",
        protocol="Which of two movements comes first. The temporal stream sees ten flow fields (DIS) at a time, at "
        "every fifth frame, and averages: one after the other, both movements fit into ten fields. Ten frames apart "
        "they do not; each passes through the ten fields as the other does, so that the average is at chance by "
        "construction. What is tested is that flow tells the near order, and that the distant one can be read: by "
        "C3D, which sees the whole clip. So it is the windows of flow, and their average, that are short.",
        experiments=(
            *experiments("trial", size, (TEMPORAL,), 300, task=near),
            *experiments("trial", size, (TEMPORAL, "c3d"), 300, task=far),
        ),
        predictions=(
            Prediction(
                "flow tells the order of movements far better when they are near",
                POINTS,
                CLEARLY,
                difference({"task": near}, {"task": far}, model=TEMPORAL),
            ),
            Prediction(
                "a network over the whole clip tells the distant order better than flow",
                POINTS,
                CLEARLY,
                difference(named("c3d"), named(TEMPORAL), task=far),
            ),
        ),
        controls=(
            reaches("flow tells the near order", 60, model=TEMPORAL, task=near),
            reaches("C3D tells the distant order", 90, model="c3d", task=far),
        ),
        plot=Plot("task", "top1", "model", "", "top-1 accuracy", percent=True, level=0.5),
    )


def streams_complement(size: Size) -> Claim:
    task, apart = "shape_direction", {SPATIAL: "spatial", TEMPORAL: "temporal"}
    return Claim(
        name="two_streams_complement_each_other",
        says="The spatial and the temporal stream complement each other.",
        source="Simonyan & Zisserman (2014), arXiv:1406.2199, §5",
        protocol="Which of three shapes moves, and which way: of six classes a single frame tells three apart and "
        "motion two. Each stream trained by itself, and the average of the scores of both.",
        experiments=streams(size, 350, task),
        predictions=tuple(
            Prediction(
                f"together they are more accurate than the {words} stream",
                POINTS,
                MATTERS,
                difference(named(BOTH), named(name)),
            )
            for name, words in apart.items()
        ),
        controls=(
            reaches("the spatial stream tells the shapes (50 % is all that it can)", 40, model=SPATIAL),
            reaches("the temporal stream tells the ways (33 % is all that motion tells)", 28, model=TEMPORAL),
        ),
        plot=Plot("model", "top1", "model", "", "top-1 accuracy", percent=True, level=1 / 6),
    )


def streams_are_not_aligned(size: Size) -> Claim:
    task = "colour_binding"
    return Claim(
        name="two_streams_are_not_aligned",
        says="Nothing aligns the two streams: what was seen to move is not known to be what was seen.",
        source="Feichtenhofer, Pinz & Zisserman (2016), arXiv:1604.06573, §1",
        protocol="A red and a blue disc move in opposite ways: which goes where? Both colours and both motions are "
        "in every clip, and the discs have one luminance, so that flow cannot tell them apart. Two streams, each "
        "trained by itself, their scores averaged, against C3D; that the temporal stream reads such motion is seen on "
        "the direction of time.",
        experiments=(
            *streams(size, 350, task),
            *experiments("trial", size, ("c3d",), 350, task=task),
            *experiments("trial", size, (TEMPORAL,), 150, task="time_direction"),
        ),
        predictions=(
            Prediction(
                "a 3D network is more accurate than two streams",
                POINTS,
                CLEARLY,
                difference(named("c3d"), named(BOTH), task=task),
            ),
        ),
        controls=(
            reaches("the temporal stream reads motion", 85, model=TEMPORAL, task="time_direction"),
            reaches("C3D tells which disc goes where", 90, model="c3d", task=task),
        ),
        plot=Plot("task", "top1", "model", "", "top-1 accuracy", percent=True, level=0.5),
    )


def slow_fusion_is_best(size: Size) -> Claim:
    dots, disc = "random_dots:clip_length=10", "time_direction:clip_length=10"
    others = {"early_fusion": "early", "late_fusion": "late"}
    tasks = {dots: "on dots", disc: "on a disc"}
    return Claim(
        name="slow_fusion_is_best",
        says="Slow fusion does better than early and late fusion.",
        source="Karpathy et al. (2014), §4.1 and table 1",
        protocol="The three at an eighth of their width on ten frames: which way short-lived dots move, and which way "
        "a disc does; on equally many clips, each at the better of two learning rates. Of the dots late fusion sees "
        "the first and the last frame, between which every one was born anew: there it is at chance by construction. "
        "Of the disc those two frames can be enough.",
        experiments=tuple(
            one
            for task in tasks
            for one in experiments("trial", size, (*others, "slow_fusion"), 400, rates=TWO_RATES, task=task)
        ),
        predictions=tuple(
            Prediction(
                f"{where}, slow fusion is more accurate than {words} fusion",
                POINTS,
                MATTERS,
                difference(named("slow_fusion"), named(name), task=task),
            )
            for task, where in tasks.items()
            for name, words in others.items()
        ),
        controls=tuple(
            reaches(f"{where}, slow fusion reads the motion", 85, model="slow_fusion", task=task)
            for task, where in tasks.items()
        ),
        plot=Plot("task", "top1", "model", "", "top-1 accuracy", percent=True, level=0.5),
    )


def easier_to_optimise(size: Size) -> Claim:
    task = "time_direction"
    return Claim(
        name="r2plus1d_is_easier_to_optimise",
        says="R(2+1)D is easier to optimise than R3D.",
        source="Tran et al. (2018), arXiv:1711.11248, §3.5 and figure 3",
        protocol="Training loss, the mean over equally many steps, the networks of as many parameters at a sixteenth "
        "of their width, on the direction of time; each at the best of three learning rates.",
        experiments=experiments("trial", size, (FACTORISED, "r3d_18"), 150, rates=(5e-3, 1e-2, 2e-2), task=task),
        predictions=(
            Prediction(
                "R3D's training loss is higher",
                "nats",
                0.02,
                difference(named("r3d_18"), named(FACTORISED), "loss", 1.0, task=task),
            ),
        ),
        plot=Plot("model", "loss", "model", "", "mean training loss, nats"),
    )
