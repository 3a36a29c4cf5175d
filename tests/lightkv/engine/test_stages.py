"""Groups of layers between stages, and which of them all questions share."""

import pytest

from lightkv import LightKVConfig, Stage
from lightkv.engine.stages import Stages

DEPTH = 5
STAGES = (Stage(-1, drop=0.5), Stage(1, drop=0.5), Stage(3, drop=0.5))


@pytest.mark.parametrize(
    ("config", "groups", "shared"),
    [
        (None, [range(DEPTH)], 1),
        (LightKVConfig(STAGES, method="spacetime"), [range(0), range(2), range(2, 4), range(4, 5)], 4),
        (LightKVConfig(STAGES, method="asked"), [range(0), range(2), range(2, 4), range(4, 5)], 2),
    ],
)
def test_questions_share_the_groups_before_the_first_stage_that_depends_on_them(config, groups, shared):
    stages = Stages(config, DEPTH)
    assert stages.groups == groups
    assert stages.shared_groups == shared
    assert stages.shared_layers == range(groups[shared - 1].stop)
    assert [stages.needs_qk(group) for group in range(len(groups))] == [
        shared <= group + 1 < len(groups) for group in range(len(groups))
    ]
