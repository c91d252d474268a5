"""The small network, for small images, that tests have `gtddp bench` measure."""

BENCH_RESNET = (
    "model.name=small-resnet",
    "model.blocks=2",
    "model.width=8",
    "model.batch_norm=true",
    "bench.image=[3,16,16]",
    "bench.classes=10",
)
