"""Draw: results as charts, figures and tables.

A chart is data (charts): the page draws it by plotly, and files get it by matplotlib (figures, held
as SVG and PNG by drawing). tables puts results into words and digits, and writes tables as CSV,
Markdown and LaTeX. Nothing here reads a file.

To read, in this order: tables, charts, drawing, figures. Who wants a new chart makes it in
probe/report from cells, as one of the kinds in charts, and gets both drawings.
"""
