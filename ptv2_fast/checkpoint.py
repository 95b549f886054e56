"""Kept under this name for those who import it; see `ptv2_fast.saving.checkpoint`."""

from ptv2_fast.saving.checkpoint import (
    CONFIG_NAME as CONFIG_NAME,
)
from ptv2_fast.saving.checkpoint import (
    DESCRIPTION_KEY as DESCRIPTION_KEY,
)
from ptv2_fast.saving.checkpoint import (
    FORMAT_VERSION as FORMAT_VERSION,
)
from ptv2_fast.saving.checkpoint import (
    LABELS_KEY as LABELS_KEY,
)
from ptv2_fast.saving.checkpoint import (
    SET_KEY as SET_KEY,
)
from ptv2_fast.saving.checkpoint import (
    TRAINER_WEIGHTS_NAME as TRAINER_WEIGHTS_NAME,
)
from ptv2_fast.saving.checkpoint import (
    WEIGHTS_NAME as WEIGHTS_NAME,
)
from ptv2_fast.saving.checkpoint import (
    Part as Part,
)
from ptv2_fast.saving.checkpoint import (
    Saved as Saved,
)
from ptv2_fast.saving.checkpoint import (
    describe as describe,
)
from ptv2_fast.saving.checkpoint import (
    load_adapters as load_adapters,
)
from ptv2_fast.saving.checkpoint import (
    pack_description as pack_description,
)
from ptv2_fast.saving.checkpoint import (
    part_of as part_of,
)
from ptv2_fast.saving.checkpoint import (
    read_description as read_description,
)
from ptv2_fast.saving.checkpoint import (
    read_labels as read_labels,
)
from ptv2_fast.saving.checkpoint import (
    save_adapters as save_adapters,
)
from ptv2_fast.saving.checkpoint import (
    write_whole as write_whole,
)
