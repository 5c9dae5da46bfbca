"""What the notebooks import. The files, in the order in which the data flows:

settings, snapshots (rows, folders, the call log), models (live models), costs (budget), calls (the LLM in front of the log, stages) ->
documents, embeddings, datasets (generate) -> replies, grading, judging (judge) -> student, pairs, finetuning, hosted (fine-tune) ->
metrics, pair_metrics, grade_metrics, report (evaluate). Imports only ever point back up this list. Beside it, `batch` sends what was
collected to the Batch API, `published` fetches the files of the 2023 run, and `__main__` is what make calls.
"""

from .calls import Collected, MissingCall, fill, run_stage
from .costs import check_run, cost_table
from .datasets import (
    ExtractiveAnswerer,
    answer_in_context,
    answer_pairs,
    answer_questions,
    clean_question,
    deal,
    generate_questions,
    save_qrd,
    write_questions,
)
from .documents import SnapshotReader, UnreadPages, Wikipedia
from .embeddings import embedding_of, local_embedding
from .finetuning import (
    LocalFinetuneEngine,
    check_events,
    count_tokens,
    finetuning_events,
    hosted_students,
    readable_events,
    resolve_pairwise_events,
    save_events,
    training_cost,
)
from .grade_metrics import compare_graders, grading_report, probabilities_of
from .grading import SingleGradingEvaluator, pool_samples, score_distribution
from .judging import judge_rows, resolve_orders
from .metrics import clusters_of, compare_students, correctness_report, measured, scores_of
from .models import CallFailed, live
from .pair_metrics import (
    answer_lengths,
    compare_pair_students,
    length_report,
    order_table,
    pair_scores,
    pairwise_report,
    position_report,
)
from .pairs import PairJudge, PairStudent, read_pair_prompt, untrained_pair_judges
from .replies import read_score, read_score_tokens, read_verdict
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
from .settings import RunStopped, models_of, name_of
from .snapshots import (
    CallLog,
    DamagedFile,
    judge_mode,
    load_rows,
    output_folder,
    save_rows,
    snapshot_folder,
)
from .student import (
    LocalJudge,
    Student,
    distillation_loss,
    embed,
    items_of,
    read_prompt,
    untrained_judges,
)
