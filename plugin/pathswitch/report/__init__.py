"""Reports: run folders -> comparison -> tables, figures, one HTML page.

Importing this package needs neither matplotlib nor jinja2; drawing a figure or rendering the page does.
"""

from pathswitch.report.collect import Comparison, collect
from pathswitch.report.html import write_report
from pathswitch.report.tables import comparison_tables, plan_table

__all__ = ["Comparison", "collect", "comparison_tables", "plan_table", "write_report"]
