"""Engines that are broken on purpose, each in one way, and the check that must refuse each.

`BROKEN` maps a check's name to the engines that it must refuse on the case of the same name in `test_checks.py`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from honest_engine import HookEngine

from broken_engines.caching import (
    AlwaysWarns,
    LastPositionOnly,
    MarkIsLostInCopies,
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
    WarnsWhereItMustRefuse,
)
from broken_engines.gradients import (
    AlwaysStops,
    LosesParameters,
    MeanCarriesGradient,
    NeverStops,
    StopsAlmost,
    StopsAtAnyStrength,
)
from broken_engines.noise import (
    ForgetsTheSeed,
    NarrowNoise,
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
    GroupForHead,
    HeadsInTurn,
    LayerBefore,
    LooksAcross,
    LooksAhead,
    OVFollowsQK,
    TouchesEverything,
)
from broken_engines.removal import (
    EndsTheInnermost,
    ForgetsOnError,
    LastOneOnly,
    LeavesAHook,
    LeavesAnAttribute,
    LeavesAParameterMoved,
    OffAfterAnError,
    RemembersTheFirstBatch,
    SwallowsErrors,
)
from broken_engines.state import (
    DrawsFromTorch,
    SeedsTorch,
    SwitchesToEval,
    WritesToItsInput,
    WritesToTheMask,
    ZeroesWeights,
)
from broken_engines.storage import CutsInThree, CutsTheFusedGraph
from broken_engines.values import (
    BlindUnderEager,
    FirstOneWins,
    FreezesTheFrozen,
    KeyForQuery,
    KeysWithValues,
    MeanOverPadding,
    Multiplies,
    NextHead,
    NoStrengthIsLittle,
    RoundsOff,
    SampleDeviation,
    WholeAtAnyStrength,
)

BROKEN: Mapping[str, Sequence[type[HookEngine]]] = {
    "check_values_are_the_oracles": [
        MeanOverPadding,
        SampleDeviation,
        WholeAtAnyStrength,
        NextHead,
        KeyForQuery,
        FirstOneWins,
        FreezesTheFrozen,
        RoundsOff,
        HeadsInTurn,
        GroupForHead,
        CutsInThree,
        NoiseOfTheRow,
    ],
    "check_zero_strength_is_unfrozen": [NoStrengthIsLittle],
    "check_full_strength_replaces_anything": [Multiplies],
    "check_implementations_agree": [BlindUnderEager],
    "check_noise_is_standard_normal": [
        UniformNoise,
        NarrowNoise,
        OneDrawForAllHeads,
        OneDrawForAllColumns,
        OneDrawForAllLayers,
        OneDrawForKAndV,
        ForgetsTheSeed,
    ],
    "check_noise_depends_on_its_place_alone": [NoiseOfTheRow, NoiseOfTheLength, NoiseOfTheCircuit],
    "check_cached_equals_recomputed": [
        SparesDecoding,
        SparesThePrompt,
        LastPositionOnly,
        StatisticsOfTheStep,
        NoiseOfTheStep,
        NoiseOfTheCache,
        NoiseOfRealTokens,
    ],
    "check_foreign_caches_are_recognised": [
        NeverWarns,
        AlwaysWarns,
        OneMarkForAllFreezes,
        MarkIsLostInCopies,
        WarnsWhereItMustRefuse,
    ],
    "check_recomputation_is_the_same_pass": [NoiseOfThePass, NoNoiseInRecomputation],
    "check_qk_leaves_ov": [TouchesEverything, NextHead],
    "check_ov_leaves_qk": [TouchesEverything, KeysWithValues],
    "check_order_does_not_matter": [OVFollowsQK],
    "check_other_heads_are_untouched": [NextHead, GroupForHead, TouchesEverything],
    "check_earlier_layers_are_untouched": [LayerBefore],
    "check_later_tokens_do_not_matter": [LooksAhead],
    "check_rows_do_not_matter": [LooksAcross],
    "check_frozen_values_reach_their_readers": [HeadsInTurn, GroupForHead, NextHead],
    "check_frozen_queries_and_keys_reach_their_readers": [HeadsInTurn, GroupForHead, NextHead],
    "check_storage_does_not_matter": [CutsInThree, CutsTheFusedGraph],
    "check_gradients_are_the_estimators": [
        AlwaysStops,
        NeverStops,
        StopsAtAnyStrength,
        StopsAlmost,
        MeanCarriesGradient,
        LosesParameters,
    ],
    "check_removal_leaves_no_trace": [LeavesAHook, LeavesAnAttribute, LeavesAParameterMoved],
    "check_error_in_body_leaves_no_trace": [ForgetsOnError, SwallowsErrors],
    "check_error_in_forward_leaves_no_trace": [OffAfterAnError],
    "check_freezes_can_be_repeated": [RemembersTheFirstBatch],
    "check_nesting_is_a_list": [LastOneOnly, EndsTheInnermost],
    "check_parameters_are_untouched": [ZeroesWeights, SwitchesToEval],
    "check_generators_are_untouched": [DrawsFromTorch, SeedsTorch],
    "check_inputs_are_not_written_to": [WritesToItsInput, WritesToTheMask],
}
