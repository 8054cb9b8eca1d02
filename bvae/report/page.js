// Draws the charts of the page in its colours, light or dark, and again when those change.
(() => {
  "use strict";
  document.documentElement.classList.add("scripted");
  const charts = JSON.parse(document.getElementById("charts").textContent);
  // Without a mouse a drag on a chart must scroll the page.
  const touch = matchMedia("(pointer: coarse)").matches;
  const config = { responsive: true, displaylogo: false, displayModeBar: touch ? false : "hover" };
  const style = () => {
    const of = getComputedStyle(document.documentElement);
    return (name) => of.getPropertyValue("--" + name).trim();
  };

  const themed = (chart) => {
    const color = style();
    const ink = color("ink"), rule = color("rule"), raised = color("raised");
    const traces = chart.traces.map((trace, i) => {
      const own = color("c" + (chart.colors[i] % 8));
      return {
        ...trace,
        line: { ...trace.line, color: own },
        marker: { ...trace.marker, color: own },
        ...(trace.fill ? { fillcolor: own + "33" } : {}),
      };
    });
    const axis = (own) => ({
      gridcolor: rule, zeroline: false, linecolor: rule, automargin: true, fixedrange: touch, ...own,
      title: { ...own.title, font: { size: 12 }, standoff: 8 },
    });
    const layout = {
      ...chart.layout,
      autosize: true,
      margin: { l: 52, r: 12, t: 12, b: 44 },
      paper_bgcolor: "rgba(0,0,0,0)",
      plot_bgcolor: "rgba(0,0,0,0)",
      font: { color: ink, size: 12, family: "system-ui, sans-serif" },
      dragmode: touch ? false : "zoom",
      hoverlabel: { bgcolor: raised, bordercolor: rule, font: { color: ink } },
      legend: { orientation: "h", x: 0, y: 1.02, yanchor: "bottom", font: { size: 11 } },
      shapes: (chart.layout.shapes || []).map((shape) => ({ ...shape, line: { ...shape.line, color: ink } })),
      xaxis: axis(chart.layout.xaxis),
      yaxis: axis(chart.layout.yaxis),
    };
    return [traces, layout];
  };

  const draw = (i) => Plotly.react("chart" + i, ...themed(charts[i]), config);
  const drawn = new Set();
  // Only what comes near the screen: a phone need not draw a hundred charts to show the first.
  const watcher = new IntersectionObserver((entries) => {
    for (const entry of entries) {
      if (entry.isIntersecting) {
        const i = Number(entry.target.id.slice(5));
        watcher.unobserve(entry.target);
        drawn.add(i);
        draw(i);
      }
    }
  }, { rootMargin: "600px" });
  charts.forEach((_, i) => watcher.observe(document.getElementById("chart" + i)));
  matchMedia("(prefers-color-scheme: dark)").addEventListener("change", () => drawn.forEach(draw));
  addEventListener("beforeprint", () => charts.forEach((_, i) => { drawn.add(i); draw(i); }));
})();
