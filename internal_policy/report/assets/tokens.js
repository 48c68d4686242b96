(function () {
  "use strict";
  var page = window.internalPolicy;
  var CIVIDIS = [[0, 34, 78], [18, 53, 112], [59, 73, 108], [87, 93, 109], [112, 113, 115], [138, 134, 120], [165, 156, 116], [195, 179, 105], [225, 204, 85], [254, 232, 56]];
  // Purple to orange: readout apart by every kind of colour blindness.
  var DIVERGING = [[84, 39, 136], [128, 115, 172], [178, 171, 210], [216, 218, 235], [247, 247, 247], [254, 224, 182], [253, 184, 99], [224, 130, 20], [179, 88, 6]];
  var SITES = ["layer", "ATTN", "FFN"], UNKNOWN = -32768;

  function unpack(text) {
    var bytes = atob(text), view = new DataView(new ArrayBuffer(bytes.length)), i;
    for (i = 0; i < bytes.length; i++) view.setUint8(i, bytes.charCodeAt(i));
    var values = new Int16Array(bytes.length / 2);
    for (i = 0; i < values.length; i++) values[i] = view.getInt16(2 * i, true);
    return values;
  }

  function nats(thousandths, signed) {
    if (thousandths === UNKNOWN) return "–";
    var text = (Math.abs(thousandths) / 1000).toFixed(3);
    return (thousandths < 0 ? "−" : signed ? "+" : "") + text;
  }

  function ink(rgb) {
    var linear = rgb.map(function (v) { v /= 255; return v <= 0.03928 ? v / 12.92 : Math.pow((v + 0.055) / 1.055, 2.4); });
    var light = 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2];
    return light > 0.179 ? "#000000" : "#ffffff";
  }

  function view(id, data) {
    var root = document.getElementById(id);
    if (!root) return;
    var part = function (name) { return root.querySelector('[data-part="' + name + '"]'); };
    var choice = part("response"), site = part("site"), quantity = part("quantity"), layer = part("layer");
    var text = part("text"), readout = part("readout"), state = part("state"), fit = part("fit");
    var unpacked = {}, spans = [], current = null, at = -1;

    function value(s, q, l, t) { return current.values[((s * 2 + q) * data.layers + l - 1) * current.texts.length + t]; }

    data.responses.forEach(function (r, i) {
      var option = document.createElement("option");
      option.value = String(i);
      option.textContent = "response " + r.number + " · " + r.size + " tokens" + (r.reward === null ? "" : " · reward " + r.reward);
      choice.append(option);
    });

    function scale() {
      var s = Number(site.value), q = Number(quantity.value), l = Number(layer.value), n = current.texts.length, low = Infinity, high = -Infinity;
      if (q === 0 && !fit.checked) return { low: 0, high: data.top, stops: CIVIDIS };
      for (var from = fit.checked ? l : 1; from <= (fit.checked ? l : data.layers); from++) {
        for (var t = 0; t < n; t++) {
          var v = value(s, q, from, t);
          if (v !== UNKNOWN) { low = Math.min(low, v / 1000); high = Math.max(high, v / 1000); }
        }
      }
      if (low > high) { low = 0; high = 1; }
      if (q === 0) return { low: low, high: high > low ? high : low + 0.001, stops: CIVIDIS };
      var reach = Math.max(Math.abs(low), Math.abs(high), 0.001);
      return { low: -reach, high: reach, stops: DIVERGING };
    }

    function legend(s) {
      var stops = s.stops.map(function (rgb) { return "rgb(" + rgb.join(",") + ")"; });
      part("ramp").style.background = "linear-gradient(to right," + stops.join(",") + ")";
      var digits = s.high - s.low < 1 ? 3 : 1, signed = s.low < 0;
      ["low", "middle", "high"].forEach(function (name, i) {
        var v = s.low + (s.high - s.low) * i / 2, zero = Math.abs(v) < 1e-9;
        part(name).textContent = zero ? "0" : (v < 0 ? "−" : signed ? "+" : "") + Math.abs(v).toFixed(digits);
      });
    }

    function tell(t) {
      at = t;
      var s = Number(site.value), l = Number(layer.value);
      var entropy = value(s, 0, l, t), change = value(s, 1, l, t), policy = current.values[6 * data.layers * current.texts.length + t];
      var before = entropy === UNKNOWN || change === UNKNOWN ? UNKNOWN : entropy - change;
      readout.textContent = "";
      var name = document.createElement("strong"), own = document.createElement("bdi");
      // A token of a script from right to left turns nothing around but itself.
      own.textContent = current.texts[t];
      name.append(own);
      readout.append(name, " token " + current.places[t] + " of " + current.size + ", id " + current.ids[t] + ", layer " + l + (s ? ", " + SITES[s] : "") + ": entropy " + nats(entropy) + " nats (in " + nats(before) + ", change " + nats(change, true) + "); policy π_θ " + nats(policy) + " nats");
    }

    function paint() {
      var s = Number(site.value), q = Number(quantity.value), l = Number(layer.value), range = scale();
      spans.forEach(function (span, t) {
        var v = value(s, q, l, t), rgb;
        if (v === UNKNOWN) { span.style.background = "none"; span.style.color = ""; return; }
        rgb = page.between(range.stops, (v / 1000 - range.low) / (range.high - range.low));
        span.style.background = "rgb(" + rgb.join(",") + ")";
        span.style.color = ink(rgb);
        span.dataset.value = nats(v, q === 1);
      });
      legend(range);
      part("layer-shown").textContent = l + (l === data.target ? " (boundary)" : "");
      layer.setAttribute("aria-valuetext", "layer " + l + (l === data.target ? ", the boundary layer" : ""));
      state.textContent = (q ? "Entropy change of " : "Entropy at the output of ") + (s ? SITES[s] + " in layer " : "layer ") + l + ", nats, of response " + current.number + ".";
      if (at >= 0) tell(at);
    }

    function choose(index) {
      current = data.responses[index];
      if (!unpacked[index]) unpacked[index] = unpack(current.values);
      current = Object.assign({}, current, { values: unpacked[index] });
      part("prompt").textContent = current.prompt;
      part("answer").textContent = current.response;
      text.textContent = "";
      at = -1;
      readout.textContent = "Point at a token, or reach it with the arrow keys.";
      var all = document.createDocumentFragment();
      spans = current.texts.map(function (token, t) {
        if (t > 0 && current.places[t] !== current.places[t - 1] + 1) all.append(gap());
        var span = document.createElement("span");
        span.className = "token";
        span.setAttribute("role", "option");
        span.tabIndex = t ? -1 : 0;
        span.dataset.token = String(t);
        span.textContent = token;
        all.append(span);
        if (/⏎/.test(token)) all.append(document.createElement("br"));
        return span;
      });
      if (current.places.length && current.places[current.places.length - 1] < current.size) all.append(gap());
      text.append(all);
      paint();
    }

    function gap() {
      var dots = document.createElement("span");
      dots.className = "gap";
      dots.setAttribute("aria-hidden", "true");
      dots.textContent = "…";
      return dots;
    }

    function reached(event) {
      var span = event.target.closest(".token");
      if (!span) return;
      spans.forEach(function (other) { if (other.tabIndex === 0) other.tabIndex = -1; if (other.getAttribute("aria-selected") === "true") other.setAttribute("aria-selected", "false"); });
      span.tabIndex = 0;
      span.setAttribute("aria-selected", "true");
      tell(Number(span.dataset.token));
    }

    text.addEventListener("mouseover", function (event) {
      var span = event.target.closest(".token");
      if (span) tell(Number(span.dataset.token));
    });
    text.addEventListener("focusin", reached);
    text.addEventListener("click", function (event) {
      var span = event.target.closest(".token");
      if (span) span.focus();
    });
    text.addEventListener("keydown", function (event) {
      var steps = { ArrowRight: 1, ArrowDown: 1, ArrowLeft: -1, ArrowUp: -1, Home: -1e9, End: 1e9 }, step = steps[event.key];
      var span = event.target.closest(".token");
      if (!step || !span) return;
      event.preventDefault();
      spans[Math.min(Math.max(Number(span.dataset.token) + step, 0), spans.length - 1)].focus();
    });
    [site, quantity, fit].forEach(function (control) { control.addEventListener("change", paint); });
    layer.addEventListener("input", paint);
    choice.addEventListener("change", function () { choose(Number(choice.value)); });
    layer.value = String(data.start);
    choose(0);
  }

  Object.keys(page.data.tokens).forEach(function (id) { view(id, page.data.tokens[id]); });
})();
