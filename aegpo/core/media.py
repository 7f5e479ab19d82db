"""What models paint and rewards read: images, or videos, and whether the two fit."""

from __future__ import annotations

from aegpo.core.parts import ModelSpec, RewardSpec


def why_unread(reward: RewardSpec, model: ModelSpec) -> str | None:
    """Why a reward cannot score what a model paints, and what would be right; None: it can."""
    who, painter = f"reward {reward.label!r}", f"model {model.kind!r}"
    if model.media == "image":
        if reward.media == "video":
            return f"{who} reads videos, but {painter} paints images; choose a model of videos, or another reward"
        if reward.frames is not None:
            return f"{who} has 'frames: {reward.frames}', but {painter} paints images, which have none; leave it out"
        return None
    if reward.media == "image" and reward.frames is None:
        return (
            f"{who} reads images, but {painter} paints videos; say what becomes of its scores of the frames: "
            "'frames: mean', 'first' or 'min'"
        )
    if reward.media == "video" and reward.frames is not None:
        return f"{who} reads videos whole, so 'frames: {reward.frames}' has nothing to do; leave it out"
    return None
