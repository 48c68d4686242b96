(function () {
  "use strict";
  var VIRIDIS = [[68, 1, 84], [72, 40, 120], [62, 74, 137], [49, 104, 142], [38, 130, 142], [31, 158, 137], [53, 183, 121], [109, 205, 89], [180, 222, 44], [253, 231, 37]];
  var COLOURS = { color: true, fillcolor: true };
  var page = window.internalPolicy = { data: JSON.parse(document.getElementById("report-data").textContent) };

  page.between = function (stops, share) {
    var at = Math.min(Math.max(share, 0), 1) * (stops.length - 1);
    var low = Math.min(Math.floor(at), stops.length - 2);
    return stops[low].map(function (v, i) { return Math.round(v + (at - low) * (stops[low + 1][i] - v)); });
  };

  // plotly resolves no CSS variables: var(--attn) is read from the page, var(--shade-0.25) from the scale.
  function colour(name, css) {
    var parts = /^var\(--(shade-)?([\w.]+)\)$/.exec(name);
    if (!parts) return name;
    if (!parts[1]) return css.getPropertyValue("--" + parts[2]).trim();
    // The bright end of the scale is lost on white paper, the dark one on black.
    var dark = css.getPropertyValue("--scheme").trim() === "dark";
    return "rgb(" + page.between(VIRIDIS, (dark ? 0.25 : 0) + (dark ? 0.75 : 0.88) * Number(parts[2])).join(",") + ")";
  }

  // Only fields that hold a colour are looked at: a name may begin with any sign.
  function resolved(value, css, key) {
    if (typeof value === "string") return COLOURS[key] ? colour(value, css) : value;
    if (Array.isArray(value)) return value.map(function (v) { return resolved(v, css, key); });
    if (value && typeof value === "object") {
      var found = {};
      Object.keys(value).forEach(function (k) { found[k] = resolved(value[k], css, k); });
      return found;
    }
    return value;
  }

  // Where layers are close, the last one is not readout together with what stands beyond it.
  function apart(made, host) {
    var range = made.xaxis.range, last = made.xaxis.tickvals[made.xaxis.tickvals.length - 1];
    var pixels = (host.clientWidth - 72) * (made.xaxis2.tickvals[0] - last) / (range[1] - range[0]);
    return Math.max(3, Math.min(20, Math.floor(pixels) - 6));
  }

  function layout(spec, css, host) {
    var fg = css.getPropertyValue("--fg").trim(), grid = css.getPropertyValue("--grid").trim();
    var printing = document.documentElement.classList.contains("printing");
    var bg = css.getPropertyValue("--card").trim(), narrow = !printing && host.clientWidth < 560;
    var axis = { color: fg, gridcolor: grid, linecolor: fg, zeroline: false, showline: true, ticks: "outside", automargin: true };
    var made = resolved(JSON.parse(JSON.stringify(spec.layout)), css, "");
    made.xaxis = Object.assign({}, axis, made.xaxis);
    made.yaxis = Object.assign({}, axis, made.yaxis);
    made.xaxis.showgrid = false;
    // Older versions of plotly show the number alone.
    var what = made.xaxis.title.text.split(",")[0], form = made.xaxis.hoverformat;
    made.xaxis.unifiedhovertitle = { text: what + " %{x" + (form ? ":" + form : "") + "}" };
    if (narrow && made.xaxis.nticks) made.xaxis.nticks = 6;
    if (made.xaxis2) made.hoverdistance = apart(made, host);
    // Paper has a width of its own, which the page does not have yet when it is asked to be printed.
    Object.assign(made, printing ? { width: 660, height: 272 } : { autosize: true });
    return Object.assign(made, {
      paper_bgcolor: "rgba(0,0,0,0)", plot_bgcolor: "rgba(0,0,0,0)", showlegend: false, hovermode: spec.key.length > 12 || !spec.key.length ? "closest" : "x unified",
      font: { family: getComputedStyle(document.body).fontFamily, size: narrow ? 12 : 13, color: fg },
      hoverlabel: { bgcolor: bg, bordercolor: fg, font: { color: fg, size: narrow ? 12 : 13 }, align: "left" },
      margin: { l: 48, r: 12, t: 24, b: 44 }, dragmode: window.matchMedia("(pointer: coarse)").matches ? false : "zoom"
    });
  }

  // A bar of buttons would lie on the curves; dragging zooms, and a double click shows all again.
  var CONFIG = { displayModeBar: false, responsive: true, showTips: false, doubleClick: "reset" };

  function traces(spec, css) {
    return spec.traces.map(function (t) { return resolved(t, css, ""); });
  }

  // What a reader has switched on or off outlives a change of theme.
  function shown(spec, made) {
    spec.key.forEach(function (entry) {
      entry.traces.forEach(function (i) { made[i].visible = entry.shown; });
    });
    return made;
  }

  function key(host, spec) {
    var list = document.getElementById(host.id + "-key");
    list.hidden = spec.single;
    spec.key.forEach(function (entry) {
      var item = document.createElement("button"), sign = document.createElement("span");
      item.type = "button";
      item.className = "key";
      item.setAttribute("aria-pressed", String(entry.shown));
      sign.className = "sign " + entry.sign;
      item.append(sign, document.createTextNode(entry.name));
      item.addEventListener("click", function () {
        entry.shown = !entry.shown;
        item.setAttribute("aria-pressed", String(entry.shown));
        Plotly.restyle(host, { visible: entry.shown }, entry.traces);
      });
      entry.element = sign;
      list.append(item);
    });
  }

  function paint(host, spec, css) {
    spec.key.forEach(function (entry) { entry.element.style.setProperty("--sign", colour(entry.color, css)); });
    return Plotly.react(host, shown(spec, traces(spec, css)), layout(spec, css, host), CONFIG);
  }

  page.paintAll = function () {
    if (!window.Plotly) return;
    var css = getComputedStyle(document.documentElement);
    Object.keys(page.data.charts).forEach(function (id) {
      var host = document.getElementById(id);
      if (host) paint(host, page.data.charts[id], css);
    });
  };

  Object.keys(page.data.charts).forEach(function (id) {
    var host = document.getElementById(id);
    if (host) key(host, page.data.charts[id]);
  });
})();
