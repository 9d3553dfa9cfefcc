use std::net::Ipv4Addr;

use tokio::net::TcpListener;

use super::*;

/// Ends a test that hangs.
const PATIENCE: Duration = Duration::from_secs(60);

fn how(fall: u8, rise: u8) -> HealthCheck {
    HealthCheck {
        port: 80,
        interval: Duration::from_millis(100),
        timeout: Duration::from_millis(500),
        fall,
        rise,
    }
}

fn subject(node: &str) -> Subject {
    let name = |text| Name::new(text).unwrap();
    Subject { balancer: name("front"), node: name(node), instance: None }
}

#[test]
fn verdicts_need_as_many_results_in_a_row_as_asked_for() {
    for (results, verdicts) in [
        // The first success decides.
        ("+", "+"),
        ("-+", "?+"),
        ("---", "??-"),
        ("+--+---", "++++++-"),
        // Three failures to fall, two successes to rise.
        ("---+-++", "??----+"),
    ] {
        let mut counter = Counter::new(how(3, 2));
        let shown: String = results
            .chars()
            .map(|result| {
                let result = if result == '+' { Ok(()) } else { Err("refused".to_owned()) };
                let failed = result.is_err();
                match counter.count(result) {
                    None => '?',
                    Some(Verdict { healthy, message }) => {
                        assert_eq!(!message.is_empty(), failed);
                        if healthy { '+' } else { '-' }
                    }
                }
            })
            .collect();
        assert_eq!(shown, verdicts, "{results}");
    }
}

/// Takes verdicts until `wanted` holds.
async fn until(
    checker: &mut Checker,
    incoming: &mut mpsc::Receiver<Found>,
    wanted: impl Fn(&View) -> bool,
) {
    timeout(PATIENCE, async {
        while !wanted(&checker.view) {
            let found = incoming.recv().await.unwrap();
            checker.take(found);
        }
    })
    .await
    .unwrap();
}

async fn listen() -> (TcpListener, SocketAddr) {
    let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).await.unwrap();
    let address = listener.local_addr().unwrap();
    (listener, address)
}

#[tokio::test]
async fn backends_are_followed_as_they_come_and_go() {
    let (listener, open) = listen().await;
    let (gone, closed) = listen().await;
    drop(gone);
    let check = |addresses: Vec<SocketAddr>| Check { addresses, how: how(2, 1) };
    let (verdicts, mut incoming) = mpsc::channel(8);
    let mut checker = Checker::new(verdicts);
    let mut wanted = Checks::from([
        (subject("web-1"), check(vec![open])),
        (subject("web-2"), check(vec![closed])),
        (subject("web-3"), check(vec![open, closed])),
    ]);
    checker.adopt(&wanted);
    let healthy = |view: &View, node: &str| view.get(&subject(node)).map(|v| v.healthy);
    until(&mut checker, &mut incoming, |view| view.len() == 3).await;
    assert_eq!(healthy(&checker.view, "web-1"), Some(true));
    assert_eq!(healthy(&checker.view, "web-2"), Some(false));
    assert_eq!(healthy(&checker.view, "web-3"), Some(false), "one family fails");
    let message = &checker.view[&subject("web-2")].message;
    assert!(message.starts_with(&closed.to_string()), "{message}");

    // A check that stays keeps its task and its verdict; others go, change and come.
    let id = checker.running[&subject("web-1")].id;
    wanted.remove(&subject("web-2"));
    wanted.insert(subject("web-3"), check(vec![open]));
    let stale = (
        checker.running[&subject("web-3")].id,
        subject("web-3"),
        checker.view[&subject("web-3")].clone(),
    );
    checker.adopt(&wanted);
    assert_eq!(checker.running[&subject("web-1")].id, id);
    assert_eq!(
        checker.view.keys().collect::<Vec<_>>(),
        [&subject("web-1"), &subject("web-3")][..1]
    );
    assert!(!checker.take(stale), "of a check that is over");
    until(&mut checker, &mut incoming, |view| healthy(view, "web-3") == Some(true)).await;

    drop(listener);
    until(&mut checker, &mut incoming, |view| healthy(view, "web-1") == Some(false)).await;
    let again = TcpListener::bind(open).await.unwrap();
    until(&mut checker, &mut incoming, |view| healthy(view, "web-1") == Some(true)).await;
    drop(again);
}

#[test]
fn checks_are_spread_over_a_tenth_of_the_interval() {
    let interval = Duration::from_millis(1_000);
    for _ in 0..100 {
        let wait = spread(interval);
        assert!(wait <= interval && wait >= Duration::from_millis(900), "{wait:?}");
    }
}
