"""Reports: run folders -> one comparison per split -> tables, figures, one HTML page, JSON.

Importing this package needs neither matplotlib nor jinja2; drawing a figure or rendering the page does.
"""

from pathswitch.report.collect import Comparison, collect
from pathswitch.report.export import to_json
from pathswitch.report.html import write_report
from pathswitch.report.tables import comparison_tables, plan_table

__all__ = ["Comparison", "collect", "comparison_tables", "plan_table", "to_json", "write_report"]
