//! Tests of the command line from a script's view: exit codes, messages and the JSON file.

#[cfg(target_os = "linux")]
use std::io::{BufRead, BufReader, Read};
use std::process::{Command, Output};

fn ferroflash(arguments: &[&str]) -> Output {
    Command::new(env!("CARGO_BIN_EXE_ferroflash")).args(arguments).output().expect("the binary runs")
}

fn text(bytes: &[u8]) -> String {
    String::from_utf8_lossy(bytes).into_owned()
}

#[test]
fn check_passes_and_says_so() {
    let random = ferroflash(&["check", "--device", "cpu", "--cases", "6", "--seed", "3"]);
    assert!(random.status.success(), "{random:?}");
    // Both passes run, unless one is selected.
    assert!(text(&random.stdout).contains("12 passed, 0 failed"));
    let one = ferroflash(&[
        "check",
        "--device",
        "cpu",
        "--op",
        "forward",
        "--batch",
        "2",
        "--heads-q",
        "6",
        "--heads-kv",
        "2",
        "--seqlen-q",
        "113",
        "--seqlen-k",
        "203",
        "--head-dim",
        "40",
        "--dtype",
        "f16",
        "--mask",
        "causal",
        "--scale",
        "0.2",
        "--layout",
        "bshd",
        "--input-std",
        "2",
    ]);
    assert!(one.status.success(), "{one:?}");
    assert!(text(&one.stdout).contains("1 passed, 0 failed"));
}

/// The table shows the worst of the three gradients.
#[test]
fn check_judges_gradients() {
    for determinism in ["fast", "exact"] {
        let flags = ["--op", "backward", "--determinism", determinism, "--seqlen-q", "130", "--seqlen-k", "70"];
        let case = ["--heads-kv", "2", "--head-dim", "40", "--mask", "causal", "--seed", "1"];
        let output = ferroflash(&[&["check", "--device", "cpu"][..], &flags, &case].concat());
        assert!(output.status.success(), "{output:?}");
        let table = text(&output.stdout);
        assert!(table.contains("1 passed, 0 failed"), "{table}");
        let row = table.lines().find(|line| line.contains("bhsd")).expect("a row");
        assert_eq!(row.contains("backward exact"), determinism == "exact", "{row}");
        assert!(["dQ", "dK", "dV"].iter().any(|name| row.contains(name)), "{row}");
    }
}

#[test]
fn dropout_is_checked_and_measured() {
    let flags = ["--dropout", "0.1", "--seqlen-q", "65", "--seed", "5"];
    let output = ferroflash(&[&["check", "--device", "cpu"][..], &flags].concat());
    assert!(output.status.success(), "{output:?}");
    let table = text(&output.stdout);
    assert!(table.contains("2 passed, 0 failed") && table.contains("dropout 0.1"), "{table}");
    for (command, p) in [("check", "1"), ("check", "-0.1"), ("bench", "NaN"), ("bench", "x")] {
        let output = ferroflash(&[command, "--device", "cpu", "--dropout", p]);
        assert_eq!(output.status.code(), Some(2), "{command} {p}: {output:?}");
        assert!(text(&output.stderr).contains("dropout"), "{output:?}");
    }
    let piecewise = ["check", "--device", "cpu", "--op", "piecewise,piecewise-backward", "--dropout", "0.1"];
    let output = ferroflash(&[&piecewise[..], &["--cases", "2", "--seed", "5"]].concat());
    assert!(output.status.success(), "{output:?}");
    assert!(text(&output.stdout).contains("4 passed, 0 failed"), "{output:?}");
    let json = std::env::temp_dir().join(format!("ferroflash-dropout-{}.json", std::process::id()));
    let small = ["--head-dims", "64", "--seqlens", "64", "--mask", "none", "--tokens", "64", "--hidden", "64"];
    let flags = ["bench", "--device", "cpu", "--dropout", "0.5", "--budget-ms", "1", "--json"];
    let output = ferroflash(&[&flags[..], &[json.to_str().expect("a path")], &small].concat());
    assert!(output.status.success(), "{output:?}");
    let written = std::fs::read_to_string(&json).expect("a file");
    std::fs::remove_file(&json).expect("removed");
    assert_eq!(written.matches("\"dropout\": 0.5").count(), 2, "{written}");
}

/// Beyond a limit a case neither passes nor fails. The same case with smaller inputs passes.
#[test]
fn check_knows_the_limits() {
    let forward = ["forward", "--heads-q", "1", "--seqlen-q", "64", "--seqlen-k", "64", "--head-dim", "64"];
    let backward = ["backward", "--heads-q", "2", "--heads-kv", "1", "--seqlen-q", "200", "--seqlen-k", "300"];
    let total = ["total-attention", "--heads-q", "1", "--seqlen-q", "64", "--seqlen-k", "64", "--head-dim", "64"];
    for (op, dtype, std, limit) in [
        (&forward, "bf16", "100000", Some("O and LSE: |LSE| 4.1e10 is above 536870912")),
        (&forward, "f16", "12000", Some("O and LSE: |LSE| 6.0e8 is above 67108864")),
        (&forward, "f16", "400", Some("O: |LSE| 6.6e5 is above 4096")),
        (&forward, "bf16", "80", None),
        (&forward, "f16", "30", None),
        (&backward, "f16", "64", Some("gradients")),
        (&backward, "f16", "128", Some("gradients")),
        (&backward, "f16", "256", Some("gradients")),
        (&backward, "bf16", "192", Some("gradients")),
        (&backward, "f16", "20", None),
        (&backward, "bf16", "58", None),
        (&total, "f16", "8", Some("total attention")),
        (&total, "f16", "5", None),
    ] {
        let flags = ["check", "--device", "cpu", "--dtype", dtype, "--input-std", std, "--op"];
        let output = ferroflash(&[&flags[..], op].concat());
        let table = text(&output.stdout);
        assert!(output.status.success(), "{op:?} {dtype} {std}: {table}");
        match limit {
            Some(limit) => {
                assert!(table.contains(&format!("beyond the limit of {limit}")), "{op:?} {dtype} {std}: {table}");
                assert!(table.contains("0 passed, 0 failed, 1 beyond a limit"), "{op:?} {dtype} {std}: {table}");
            }
            None => assert!(table.ends_with("1 passed, 0 failed\n"), "{op:?} {dtype} {std}: {table}"),
        }
    }
    // The help is wrapped at the terminal's width.
    let help = text(&ferroflash(&["check", "--help"]).stdout);
    assert!(help.split_whitespace().collect::<Vec<_>>().join(" ").contains("\"beyond the limit\""), "{help}");
}

#[test]
fn both_passes_are_checked_in_one_run() {
    let output = ferroflash(&["check", "--device", "cpu", "--op", "forward,backward", "--seqlen-q", "65"]);
    assert!(output.status.success(), "{output:?}");
    let table = text(&output.stdout);
    assert!(table.contains("2 passed, 0 failed"), "{table}");
    assert!(table.contains(" forward ") && table.contains(" backward "), "{table}");
}

#[test]
fn total_attention_is_checked_and_measured() {
    let case = ["--seqlen-q", "130", "--seqlen-k", "70", "--heads-kv", "2", "--head-dim", "40", "--mask", "causal"];
    let output = ferroflash(&[&["check", "--device", "cpu", "--op", "total-attention"][..], &case].concat());
    assert!(output.status.success(), "{output:?}");
    let table = text(&output.stdout);
    assert!(table.contains("1 passed, 0 failed") && table.contains(" total-attention "), "{table}");
    let sizes = ["--head-dims", "64", "--seqlens", "128", "--mask", "causal", "--tokens", "128", "--hidden", "64"];
    let flags = ["bench", "--device", "cpu", "--op", "total-attention", "--budget-ms", "1"];
    let output = ferroflash(&[&flags[..], &sizes].concat());
    assert!(output.status.success(), "{output:?}");
    assert!(text(&output.stdout).contains("total-attention"), "{output:?}");
}

#[test]
fn bad_flags_exit_with_2() {
    for arguments in [
        &["check", "--dtype", "f8"][..],
        &["check", "--mask", "diagonal"],
        &["check", "--op", "sideways"],
        &["check", "--determinism", "slow"],
        &["bench", "--determinism", "Exact"],
        &["check", "--cases", "3", "--head-dim", "64"],
        &["bench", "--device", "tpu"],
        &["check", "--cases", "0"],
        &["check", "--input-std", "nan"],
        &["frobnicate"],
        &[],
    ] {
        let output = ferroflash(arguments);
        assert_eq!(output.status.code(), Some(2), "{arguments:?}: {output:?}");
    }
}

#[test]
fn bad_problems_are_named() {
    for (arguments, code, message) in [
        (&["check", "--heads-q", "0"][..], 2, "heads_q is 0"),
        (&["check", "--heads-q", "3", "--heads-kv", "2"], 2, "heads_q is 3; a multiple of heads_kv"),
        (&["check", "--head-dim", "12"], 2, "head_dim is 12"),
        (&["check", "--scale", "-1"], 2, "scale is -1"),
        (&["check", "--seqlen-q", "99999999999999999"], 2, "seqlen_q is 99999999999999999"),
        (&["bench", "--head-dims", "260"], 2, "head_dim is 260"),
        (&["check", "--op", "backward", "--heads-q", "3", "--heads-kv", "2"], 2, "heads_q is 3"),
        // Gradients cannot be judged by a sample of rows.
        (&["check", "--seqlen-q", "65536"], 2, "--op forward has no limit"),
        (
            &["check", "--op", "backward", "--seqlen-q", "1000000", "--seqlen-k", "17"],
            2,
            "gradients of 68000000 scores",
        ),
        (&["check", "--op", "total-attention", "--seqlen-q", "65536"], 2, "total attention of 17179869184 scores"),
        // These flags are valid, but this machine can't serve them.
        (&["check", "--seqlen-q", "2000000000", "--heads-q", "100"], 1, "no memory for"),
        (&["bench", "--seqlens", "2000000000", "--hidden", "6400"], 1, "no memory for"),
        (&["bench", "--json", "/no/such/folder/x.json"], 1, "x.json can't be written"),
    ] {
        let output = ferroflash(&[arguments, &["--device", "cpu"]].concat());
        assert_eq!(output.status.code(), Some(code), "{arguments:?}: {output:?}");
        assert!(text(&output.stderr).contains(message), "{arguments:?}: {output:?}");
    }
}

#[test]
fn bench_writes_json() {
    let path = std::env::temp_dir().join(format!("ferroflash-{}.json", std::process::id()));
    let name = path.to_str().expect("a path in UTF-8");
    let output = ferroflash(&[
        "bench",
        "--device",
        "cpu",
        "--head-dims",
        "64,128",
        "--determinism",
        "exact",
        "--seqlens",
        "128",
        "--mask",
        "none,causal",
        "--tokens",
        "256",
        "--hidden",
        "128",
        "--budget-ms",
        "1",
        "--json",
        name,
    ]);
    assert!(output.status.success(), "{output:?}");
    let json: serde_json::Value =
        serde_json::from_str(&std::fs::read_to_string(&path).expect("the file")).expect("JSON");
    std::fs::remove_file(&path).expect("the file");
    for field in ["gpu", "driver", "compiler", "commit"] {
        assert!(json["header"].as_object().expect("a header").contains_key(field), "{field}");
    }
    // It runs on the CPU, by default and on request.
    assert_eq!(json["header"]["protocol"], "sustained");
    let records = json["records"].as_array().expect("records");
    assert_eq!(records.len(), 8);
    let (forward, backward) = records.split_at(4);
    for record in forward {
        assert_eq!(record["op"], "forward");
        assert_eq!(record.get("determinism"), None, "{record}");
    }
    for record in backward {
        assert_eq!((&record["op"], &record["determinism"]), (&"backward".into(), &"exact".into()));
    }
    for record in records {
        for field in ["batch", "heads_q", "heads_kv", "seqlen_q", "seqlen_k", "head_dim", "peak_bytes"] {
            assert!(record[field].as_u64().is_some_and(|x| x > 0), "{field}: {record}");
        }
        for field in ["ms", "tflops", "gbps"] {
            assert!(record[field].as_f64().is_some_and(|x| x > 0.0), "{field}: {record}");
        }
        assert_eq!((&record["device"], &record["dtype"]), (&"cpu".into(), &"bf16".into()));
    }
    assert_eq!((&records[0]["mask"], &records[1]["mask"]), (&"none".into(), &"causal".into()));
}

#[test]
fn sustained_runs_are_measured() {
    let sizes = ["--head-dims", "64", "--seqlens", "64", "--mask", "none", "--tokens", "64", "--hidden", "64"];
    let flags = ["bench", "--device", "cpu", "--sustained", "--dtype", "f16,bf16", "--budget-ms", "1"];
    let json = ["--json", "/dev/stdout"];
    let output = ferroflash(&[&flags[..], &sizes, &json].concat());
    assert!(output.status.success(), "{output:?}");
    let printed = text(&output.stdout);
    assert!(printed.contains("\"protocol\": \"sustained\""), "{printed}");
    // Both passes run in both dtypes.
    for dtype in ["f16", "bf16"] {
        assert_eq!(printed.matches(&format!("\"dtype\": \"{dtype}\"")).count(), 2, "{printed}");
    }
    let help = text(&ferroflash(&["bench", "--help"]).stdout);
    assert!(["--sustained", "l2-cleared"].iter().all(|word| help.contains(word)), "{help}");
}

#[test]
#[cfg(not(feature = "cuda"))]
fn a_build_without_cuda_says_how_to_get_it() {
    for command in ["info", "check", "bench"] {
        let output = ferroflash(&[command, "--device", "cuda"]);
        assert_eq!(output.status.code(), Some(2), "{command}: {output:?}");
        assert!(text(&output.stderr).contains("--features cuda"), "{command}: {output:?}");
    }
}

#[test]
fn info_lists_the_kernels() {
    let output = ferroflash(&["info", "--device", "cpu"]);
    assert!(output.status.success(), "{output:?}");
    let forward = ferroflash::VARIANTS.iter().map(|variant| variant.symbol);
    let backward = ferroflash::BACKWARD_VARIANTS.iter();
    let backward = backward.flat_map(|v| [v.symbol, v.prepare, v.finish]);
    let total = ferroflash::TOTAL_VARIANTS.iter().map(|variant| variant.symbol);
    let table = text(&output.stdout);
    for symbol in forward.chain(backward).chain(total) {
        let rows = table.lines().filter(|line| line.split_whitespace().next() == Some(symbol)).count();
        assert_eq!(rows, 1, "{symbol}");
    }
}

#[test]
fn help_has_examples() {
    for arguments in [&["--help"][..], &["check", "--help"], &["bench", "--help"]] {
        assert!(text(&ferroflash(arguments).stdout).contains("Examples:"), "{arguments:?}");
    }
}

/// Starts the command, sends it the signal of Ctrl-C after its first line, and returns everything that it printed.
#[cfg(target_os = "linux")]
fn interrupted(arguments: &[&str]) -> String {
    let mut child = Command::new(env!("CARGO_BIN_EXE_ferroflash"))
        .args(arguments)
        .stdout(std::process::Stdio::piped())
        .spawn()
        .expect("the binary runs");
    let mut stdout = BufReader::new(child.stdout.take().expect("a pipe"));
    let mut printed = String::new();
    // Ctrl-C is caught before the first line, even if the machine takes long to get there.
    stdout.read_line(&mut printed).expect("a line");
    std::thread::sleep(std::time::Duration::from_millis(500));
    let killed = Command::new("kill").args(["-INT", &child.id().to_string()]).status().expect("kill runs");
    assert!(killed.success());
    stdout.read_to_string(&mut printed).expect("text");
    let status = child.wait().expect("it ends");
    assert_eq!(status.code(), Some(130), "{status:?}: {printed}");
    printed
}

/// A first Ctrl-C ends the sweep after the current case, and keeps the cases judged so far.
#[test]
#[cfg(target_os = "linux")]
fn ctrl_c_keeps_what_was_judged() {
    let printed = interrupted(&["check", "--device", "cpu", "--cases", "100000"]);
    assert!(printed.contains("passed"), "{printed}");
}

/// A measurement that Ctrl-C interrupted is no record: there is no NaN in the table and no null in the file.
#[test]
#[cfg(target_os = "linux")]
fn ctrl_c_leaves_no_half_measurement() {
    let path = std::env::temp_dir().join(format!("ferroflash-interrupted-{}.json", std::process::id()));
    let name = path.to_str().expect("a path in UTF-8");
    let flags = ["--head-dims", "64", "--seqlens", "64", "--tokens", "64", "--hidden", "64", "--budget-ms", "60000"];
    let printed = interrupted(&[&["bench", "--device", "cpu", "--json", name][..], &flags].concat());
    assert!(!printed.contains("NaN"), "{printed}");
    let json: serde_json::Value =
        serde_json::from_str(&std::fs::read_to_string(&path).expect("the file")).expect("JSON");
    std::fs::remove_file(&path).expect("the file");
    assert_eq!(json["records"], serde_json::json!([]));
}

/// Runs as in `ferroflash info | head -1`.
#[test]
#[cfg(unix)]
fn a_reader_that_leaves_is_no_panic() {
    let mut child = Command::new(env!("CARGO_BIN_EXE_ferroflash"))
        .args(["info", "--device", "cpu"])
        .stdout(std::process::Stdio::piped())
        .stderr(std::process::Stdio::piped())
        .spawn()
        .expect("the binary runs");
    drop(child.stdout.take());
    let output = child.wait_with_output().expect("it ends");
    assert!(output.stderr.is_empty(), "{}", text(&output.stderr));
}
