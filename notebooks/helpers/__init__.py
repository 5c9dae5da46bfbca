"""What the notebooks import.

The files, in the order in which the data flows:

settings, rows, wordings, replies, log -> embeddings, generate -> judge -> student, pairs,
finetune -> metrics, grade_metrics, pair_metrics, report. Imports only ever point back up this list.
`__main__` is what make calls. The folder `live` is only for a run that asks a real model; the files
here never import it, and a notebook hands its models in: `log.llm(NAME, live(NAME))`.
"""

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
    ExtractiveAnswerer,
    SnapshotReader,
    answer_in_context,
    answer_pairs,
    answer_questions,
    deal,
    generate_questions,
    save_qrd,
    write_questions,
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
from .metrics import compare_students, correctness_report, measured, scores_of
from .pair_metrics import (
    compare_pair_students,
    length_report,
    order_table,
    pair_scores,
    pairwise_report,
    position_report,
)
from .pairs import PairJudge, untrained_pair_judges
from .replies import read_score, read_score_tokens
from .report import (
    compare_designs,
    invalid_judgements,
    plot_judges,
    plot_orders,
    plot_probabilities,
    plot_scores,
    plot_sweep,
    show_pair,
    versions,
    with_intervals,
)
from .rows import DATA, judge_mode, load_rows, output_folder, save_rows, snapshot_folder
from .settings import models_of, name_of
from .student import Student, distillation_loss, items_of, untrained_judges
