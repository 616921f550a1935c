from ec_agents.evaluation.checkers import (
    check_choice as check_choice,
    check_embedded as check_embedded,
    check_exact as check_exact,
    check_math as check_math,
    check_number as check_number,
)
from ec_agents.evaluation.comparison import evaluate as evaluate, evaluate_runs as evaluate_runs, tune as tune
from ec_agents.evaluation.factories import embedded_agent as embedded_agent, embedded_model as embedded_model
from ec_agents.evaluation.html import (
    write_evaluation_report as write_evaluation_report,
    write_trace_report as write_trace_report,
)
from ec_agents.evaluation.markdown import write_markdown as write_markdown
from ec_agents.evaluation.outcomes import (
    Graded as Graded,
    RunOutcome as RunOutcome,
    grade as grade,
    read_outcomes as read_outcomes,
)
from ec_agents.evaluation.plots import write_plots as write_plots
from ec_agents.evaluation.python_tests import check_python_tests as check_python_tests
from ec_agents.evaluation.run import EvalRun as EvalRun, Progress as Progress
from ec_agents.evaluation.settings import EvalSettings as EvalSettings
from ec_agents.evaluation.table import Evaluation as Evaluation, Row as Row, load_evaluation as load_evaluation
from ec_agents.evaluation.tasks import EvalTask as EvalTask, read_tasks as read_tasks
