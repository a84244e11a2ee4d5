"""Settings that the contract names and that are not built yet: a run file that uses one is refused with a reason, never ignored."""

KEYS = (
    "parallel.compile",
    "parallel.cpu_offload",
    "log.tensorboard",
    "log.wandb",
    "log.project",
    "log.run_name",
)
VALUES = (
    "model.dtype = 'float16'",
    "optim.schedule = 'wsd'",
    "parallel.activation_checkpointing = 'selective'",
)
PLANNED = {
    **dict.fromkeys(KEYS, "is planned and not built yet: remove it"),
    **dict.fromkeys(VALUES, "is planned and not built yet: use another value"),
}
