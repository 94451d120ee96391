# Public names and where they are defined, for lazy_loader, type checkers and IDEs.
from .adapters import (
    check as check,
)
from .adapters.dictionaries import (
    Dictionary as Dictionary,
)
from .adapters.loading import (
    load_demo as load_demo,
)
from .adapters.loading import (
    load_model as load_model,
)
from .adapters.questions.directions import (
    Direction as Direction,
)
from .engine.citations import (
    cite as cite,
)
from .errors import (
    ContextMixError as ContextMixError,
)
from .errors import (
    ContextMixWarning as ContextMixWarning,
)
from .errors import (
    InvalidInput as InvalidInput,
)
from .errors import (
    UnsupportedModel as UnsupportedModel,
)
from .evaluation import (
    faithfulness as faithfulness,
)
from .evaluation.compare import (
    compare as compare,
)
from .evaluation.context_reliance import (
    context_reliance as context_reliance,
)
from .evaluation.cost.estimate import (
    estimate as estimate,
)
from .evaluation.probing import (
    probe as probe,
)
from .evaluation.scan import (
    scan as scan,
)
from .methods.alti import (
    alti as alti,
)
from .methods.attention import (
    attention as attention,
)
from .methods.attention_flow import (
    attention_flow as attention_flow,
)
from .methods.attention_knockout import (
    attention_knockout as attention_knockout,
)
from .methods.decoder_lens.lens import (
    decoder_lens as decoder_lens,
)
from .methods.decompose import (
    decompose as decompose,
)
from .methods.decompx import (
    decompx as decompx,
)
from .methods.flow import (
    flow as flow,
)
from .methods.globenc import (
    globenc as globenc,
)
from .methods.gradients import (
    gradient_x_input as gradient_x_input,
)
from .methods.gradients import (
    integrated_gradients as integrated_gradients,
)
from .methods.information_flow_routes import (
    information_flow_routes as information_flow_routes,
)
from .methods.log_prob.contributions import (
    log_prob_contributions as log_prob_contributions,
)
from .methods.log_prob.knockout import (
    knockout as knockout,
)
from .methods.log_prob.queries import (
    query_contributions as query_contributions,
)
from .methods.log_prob.readouts import (
    component_readouts as component_readouts,
)
from .methods.memories import (
    composition as composition,
)
from .methods.memories import (
    load_triggers as load_triggers,
)
from .methods.memories import (
    mine_triggers as mine_triggers,
)
from .methods.memories.ff_memories import (
    ff_memories as ff_memories,
)
from .methods.memories.ff_values import (
    ff_values as ff_values,
)
from .methods.memories.token_memory import (
    token_memory as token_memory,
)
from .methods.norm_changes import (
    amplified_pairs as amplified_pairs,
)
from .methods.norm_changes import (
    cancellation as cancellation,
)
from .methods.norm_changes import (
    contextualization_change as contextualization_change,
)
from .methods.norms import (
    attention_norms as attention_norms,
)
from .methods.norms import (
    mixing_ratio as mixing_ratio,
)
from .methods.value_zeroing import (
    value_zeroing as value_zeroing,
)
from .reporting import (
    report as report,
)

__all__: list[str]
