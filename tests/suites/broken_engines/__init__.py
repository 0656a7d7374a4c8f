"""Engines that are broken on purpose, each in one way, and the claim whose business each is.

`BROKEN` maps a claim, by the name of its property without `test_`, to the engines that it must refuse.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from honest_engine import HookEngine

from broken_engines.caching import (
    AlwaysWarns,
    ColumnsFromTheKeptKeys,
    LastPositionOnly,
    MarkIsLostInCopies,
    MarkIsLostWhenCropped,
    MarkIsLostWhenReordered,
    MarksTheStrengthAlone,
    MaskOfTheLastPass,
    NeverWarns,
    NoiseOfRealTokens,
    NoiseOfTheCache,
    NoiseOfThePass,
    NoiseOfTheStep,
    NoNoiseInRecomputation,
    OneMarkForAllFreezes,
    SparesDecoding,
    SparesThePrompt,
    StatisticsOfTheStep,
    TakesWhatWasAddedForItsOwn,
    WarnsWhereItMustRefuse,
)
from broken_engines.calibration import (
    CalibratesOverPadding,
    IgnoresStatistics,
    IgnoresTheDeviation,
    MeanOfMeans,
    SampleDeviationOfAll,
    StatisticsOfTheLayerBefore,
)
from broken_engines.entering import (
    AsksTheSignatureForAMask,
    OffInInferenceMode,
    OffInTrainingMode,
    ReadsNamedArgumentsAlone,
    SparesEmbeddings,
    SparesThePromptOfACallersCache,
)
from broken_engines.gradients import (
    AlwaysStops,
    CircuitIsStraightThrough,
    CircuitStops,
    LeaksThePattern,
    LosesParameters,
    LosesTangents,
    MeanCarriesGradient,
    NeverStops,
    NotFrozenWhileTraining,
    ScalesStraightThrough,
    SparesEverything,
    StopsAlmost,
    StopsAtAnyStrength,
)
from broken_engines.noise import (
    AddsUpLayerAndColumn,
    EverySecondHeadAlike,
    ForgetsTheSeed,
    NarrowNoise,
    NoiseComesRoundAgain,
    NoiseOfTheCircuit,
    NoiseOfTheLength,
    NoiseOfTheRow,
    OneDrawForAllColumns,
    OneDrawForAllHeads,
    OneDrawForAllLayers,
    OneDrawForKAndV,
    UniformNoise,
)
from broken_engines.reach import (
    DoesNothing,
    FirstRowOnly,
    GroupForHead,
    HalvesTheGradientOfTheMLP,
    HalvesTheMLP,
    HeadsInTurn,
    LayerBefore,
    LayerBeforeAlone,
    LooksAcross,
    LooksAhead,
    NextGroup,
    OVFollowsQK,
    SparesTheLastPosition,
    SpillsOver,
    TouchesEverything,
)
from broken_engines.references import (
    ColumnBefore,
    FirstRowForAll,
    HoldsQueriesAlone,
    LayerBeforeRecorded,
    LosesTheStrength,
    RecordedHeadsInTurn,
    RecordsHeadsBackwards,
    RecordsNoMask,
    RecordsRoundedValues,
    RecordsTheColumnBefore,
    RecordsTheOutput,
)
from broken_engines.removal import (
    EndsTheInnermost,
    ForgetsOnError,
    InnerEndEndsAll,
    KeepsTheLastMask,
    LastOneOnly,
    LeavesAHook,
    LeavesAnAttribute,
    LeavesAParameterMoved,
    LostAfterTheSecondPass,
    OffAfterAnError,
    RemembersTheFirstBatch,
    StaysAfterAnInterrupt,
    StaysBeneathAWrapper,
    SwallowsErrors,
)
from broken_engines.resampling import (
    AveragesTheOthers,
    KeepsItsOwnRow,
    ResamplesAnewAtEachStep,
    RowsOfTheTokens,
    ShufflesAnew,
    TakesOneRowTwice,
    TakesTheColumnBefore,
)
from broken_engines.selecting import AllLayersButTheLast, CountsFromTheFrontAlone, FirstHeadForAll
from broken_engines.state import (
    DrawsFromTorch,
    EditsInPlace,
    EndsForwardHooksOfOthers,
    EndsHooksOfOthers,
    HidesHooksOfOthers,
    ReadsTheConfigLate,
    RecomputesTheProjection,
    SeedsTorch,
    SwitchesToEval,
    WritesToItsInput,
    WritesToTheMask,
    ZeroesWeights,
)
from broken_engines.storage import (
    CutsInThree,
    CutsTheFusedGraph,
    SwapsKeysAndValues,
)
from broken_engines.unservable import (
    CountsPaddingAlone,
    CutsTheReference,
    FailsAnyhow,
    GivesNoReason,
    HoldsTheLastColumnWhenDecoding,
    IgnoresTheMask,
    LeavesWhatItRefused,
    MeanOfAStep,
    RefusesAllCalibrated,
    RefusesStepsOfOneTokenAlone,
    ResamplesPadding,
    ResamplesRightPadding,
    TakesAnyStatistics,
)
from broken_engines.values import (
    BlindUnderEager,
    FirstOneWins,
    FreezesTheFrozen,
    KeyForQuery,
    KeysWithValues,
    LeavesNanWhereCalibrated,
    MeanOfAllFeatures,
    MeanOfEachColumn,
    MeanOfEachRow,
    MeanOverPadding,
    Multiplies,
    NextHead,
    NoStrengthIsLittle,
    RoundsOff,
    SampleDeviation,
    SparesTheBias,
    WholeAtAnyStrength,
    ZeroByDifference,
    ZeroDeviationIsNone,
)

BROKEN: Mapping[str, Sequence[type[HookEngine]]] = {
    "values_are_the_oracles": [
        DoesNothing,
        LayerBeforeAlone,
        FirstRowOnly,
        SparesTheLastPosition,
        SparesTheBias,
        SwapsKeysAndValues,
        MeanOfEachRow,
        MeanOfEachColumn,
        MeanOfAllFeatures,
        MeanOverPadding,
        SampleDeviation,
        WholeAtAnyStrength,
        NextHead,
        KeyForQuery,
        RoundsOff,
        HeadsInTurn,
        GroupForHead,
        CutsInThree,
        NoiseOfTheRow,
        ColumnBefore,
        RecordedHeadsInTurn,
        FirstRowForAll,
        LosesTheStrength,
        IgnoresStatistics,
        IgnoresTheDeviation,
        StatisticsOfTheLayerBefore,
        ZeroDeviationIsNone,
    ],
    "several_freezes_win_in_order": [FirstOneWins, FreezesTheFrozen],
    "zero_strength_is_unfrozen": [NoStrengthIsLittle],
    "full_strength_replaces_anything": [Multiplies, LeavesNanWhereCalibrated, ZeroByDifference],
    "implementations_agree": [BlindUnderEager],
    "noise_is_standard_normal": [
        UniformNoise,
        NarrowNoise,
        OneDrawForAllHeads,
        OneDrawForAllColumns,
        OneDrawForAllLayers,
        OneDrawForKAndV,
        ForgetsTheSeed,
        AddsUpLayerAndColumn,
        NoiseComesRoundAgain,
        EverySecondHeadAlike,
    ],
    "noise_depends_on_its_place_alone": [NoiseOfTheRow, NoiseOfTheLength, NoiseOfTheCircuit],
    "cached_equals_recomputed": [
        SparesDecoding,
        SparesThePrompt,
        LastPositionOnly,
        StatisticsOfTheStep,
        NoiseOfTheStep,
        NoiseOfTheCache,
        NoiseOfRealTokens,
        ResamplesAnewAtEachStep,
        ColumnsFromTheKeptKeys,
    ],
    "foreign_caches_are_recognised": [
        NeverWarns,
        AlwaysWarns,
        OneMarkForAllFreezes,
        MarksTheStrengthAlone,
        MarkIsLostInCopies,
        MarkIsLostWhenCropped,
        MarkIsLostWhenReordered,
        TakesWhatWasAddedForItsOwn,
        WarnsWhereItMustRefuse,
    ],
    "recomputation_is_the_same_pass": [NoiseOfThePass, NoNoiseInRecomputation, MaskOfTheLastPass],
    "qk_leaves_ov": [TouchesEverything, NextHead],
    "ov_leaves_qk": [TouchesEverything, KeysWithValues],
    "order_does_not_matter": [OVFollowsQK],
    "other_heads_are_untouched": [NextHead, GroupForHead, TouchesEverything, SpillsOver],
    "earlier_layers_are_untouched": [LayerBefore],
    "later_tokens_do_not_matter": [LooksAhead],
    "rows_do_not_matter": [LooksAcross],
    "the_rest_is_untouched": [HalvesTheMLP, HalvesTheGradientOfTheMLP],
    "indices_are_read_as_in_python": [CountsFromTheFrontAlone, AllLayersButTheLast, FirstHeadForAll],
    "every_way_in_is_frozen": [
        ReadsNamedArgumentsAlone,
        AsksTheSignatureForAMask,
        SparesEmbeddings,
        SparesThePromptOfACallersCache,
        OffInInferenceMode,
        OffInTrainingMode,
    ],
    "frozen_values_reach_their_readers": [DoesNothing, HeadsInTurn, NextGroup, GroupForHead, NextHead],
    "frozen_queries_and_keys_reach_their_readers": [DoesNothing, HeadsInTurn, NextGroup, GroupForHead, NextHead],
    "storage_does_not_matter": [CutsInThree, SwapsKeysAndValues, CutsTheFusedGraph],
    "gradients_are_the_estimators": [
        AlwaysStops,
        NeverStops,
        StopsAtAnyStrength,
        StopsAlmost,
        ScalesStraightThrough,
        MeanCarriesGradient,
        LosesParameters,
        LosesTangents,
        CircuitIsStraightThrough,
        CircuitStops,
        LeaksThePattern,
        SparesEverything,
    ],
    "backward_modes_share_the_forward": [NotFrozenWhileTraining],
    "recordings_are_what_attention_saw": [
        RecordsTheColumnBefore,
        RecordsHeadsBackwards,
        RecordsRoundedValues,
        RecordsTheOutput,
        RecordsNoMask,
    ],
    "patterns_are_the_recorded": [ColumnBefore, LayerBeforeRecorded, FirstRowForAll, HoldsQueriesAlone, NextHead],
    "resampling_takes_other_rows": [
        KeepsItsOwnRow,
        TakesOneRowTwice,
        TakesTheColumnBefore,
        AveragesTheOthers,
        ShufflesAnew,
        RowsOfTheTokens,
    ],
    "statistics_are_of_the_real_tokens": [CalibratesOverPadding, MeanOfMeans, SampleDeviationOfAll],
    "references_that_do_not_fit_are_errors": [
        CutsTheReference,
        IgnoresTheMask,
        CountsPaddingAlone,
        HoldsTheLastColumnWhenDecoding,
        FailsAnyhow,
    ],
    "resampling_without_another_row_is_an_error": [
        ResamplesPadding,
        ResamplesRightPadding,
        GivesNoReason,
        LeavesWhatItRefused,
    ],
    "statistics_of_a_cached_step_are_errors": [MeanOfAStep, RefusesStepsOfOneTokenAlone, RefusesAllCalibrated],
    "statistics_of_another_model_are_errors": [TakesAnyStatistics],
    "hooks_of_others_stay": [
        EndsHooksOfOthers,
        EndsForwardHooksOfOthers,
        HidesHooksOfOthers,
        RecomputesTheProjection,
    ],
    "removal_leaves_no_trace": [LeavesAHook, LeavesAnAttribute, LeavesAParameterMoved, StaysBeneathAWrapper],
    "error_in_body_leaves_no_trace": [ForgetsOnError, SwallowsErrors, StaysAfterAnInterrupt],
    "error_in_forward_leaves_no_trace": [OffAfterAnError],
    "freezes_can_be_repeated": [RemembersTheFirstBatch, LostAfterTheSecondPass, KeepsTheLastMask],
    "nesting_is_a_list": [LastOneOnly, EndsTheInnermost, InnerEndEndsAll],
    "parameters_are_untouched": [ZeroesWeights, SwitchesToEval],
    "changed_configs_do_not_matter": [ReadsTheConfigLate],
    "generators_are_untouched": [DrawsFromTorch, SeedsTorch],
    "inputs_are_not_written_to": [WritesToItsInput, WritesToTheMask, EditsInPlace],
}

# Several query heads, but not all, read a KV head.
SHARED_BY_SOME = [HeadsInTurn, NextGroup, GroupForHead, RecordedHeadsInTurn]
# There is another KV head.
SEVERAL = [NextHead, SpillsOver, RecordsHeadsBackwards]


def architectures_of(broken: type[HookEngine]) -> Sequence[str]:
    """The tiny architectures on which a flaw shows."""
    if broken in SHARED_BY_SOME:
        return ["mistral_gqa"]
    if broken is ColumnsFromTheKeptKeys:  # a sliding window
        return ["mistral_gqa"]
    if broken in SEVERAL:
        return ["mistral_gqa", "gpt2", "llama"]
    if broken is HalvesTheGradientOfTheMLP:  # behind the attention, not beside it
        return ["mistral_gqa", "gpt2", "llama"]
    if broken is OffInTrainingMode:  # where no dropout makes training another model
        return ["mistral_gqa", "llama", "falcon_mqa"]
    if broken is SparesTheBias:
        return ["gpt2", "llama", "falcon_mqa"]
    if broken is SwapsKeysAndValues:  # in one projection
        return ["gpt2", "falcon_mqa", "falcon_mha"]
    if broken is CutsInThree:  # one that holds q, k and v otherwise than one after the other
        return ["falcon_mha"]
    return ["mistral_gqa", "gpt2", "llama", "falcon_mqa"]
