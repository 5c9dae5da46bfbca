"""What the notebooks import.

The files, in the order in which the data flows:

settings, rows, wordings, replies, log -> embeddings, generate -> judge -> student, pairs,
finetune -> metrics, grade_metrics, pair_metrics, baselines, people, report. Imports only ever point
back up this list. `__main__` is what make calls. The folder `live` is only for a run that asks a
real model; the files here never import it, and a notebook hands its models in:
`log.llm(NAME, live(NAME))`.
"""

from .baselines import best_feature, untrained_judges, untrained_pair_judges, who_answered
from .finetune import (
    LocalFinetuneEngine,
    check_events,
    count_tokens,
    finetuning_events,
    readable_events,
    resolve_pairwise_events,
    save_events,
)
from .generate import (
    QUESTION_PROMPTS,
    ExtractiveAnswerer,
    SnapshotReader,
    answer_questions,
    deal,
    pair_up,
    pipelines,
    save_qrd,
    write_questions,
    write_references,
)
from .grade_metrics import compare_graders, grading_report, probabilities_of
from .judge import SingleGradingEvaluator, judge_rows, pool_samples, score_distribution
from .live.budget import cost_table
from .live.check import check_run
from .live.collect import fill
from .live.documents import live_reader
from .live.embeddings import embedding_of
from .live.finetuning import hosted_students, training_cost
from .live.models import live
from .log import CallLog
from .metrics import (
    cascade,
    cascade_cut,
    compare_students,
    correctness_report,
    measured,
    ppi_mean,
    scores_of,
)
from .pair_metrics import (
    compare_pair_students,
    length_report,
    order_table,
    pair_scores,
    pairwise_report,
    position_report,
)
from .pairs import PairJudge
from .people import add_labels, agreement_with_people, disagreements, to_label
from .replies import read_score, read_score_tokens
from .report import (
    compare_designs,
    invalid_judgements,
    plot_judges,
    plot_orders,
    plot_probabilities,
    plot_scores,
    plot_sweep,
    readable,
    show_pair,
    versions,
    with_intervals,
)
from .rows import DATA, judge_mode, load_rows, output_folder, save_rows, snapshot_folder
from .settings import models_of, name_of
from .student import Student, distillation_loss, items_of
