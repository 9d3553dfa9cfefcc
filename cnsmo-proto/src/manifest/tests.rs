use super::*;

#[test]
fn smoke() {
    let text = "kind: FirewallPolicy\nmetadata: {name: web, labels: {team: shop}}\nspec:\n  target: {role: web}\n  rules:\n  - name: http\n    action: allow\n    direction: ingress\n    from: [10.0.0.0/8, \"fd00::/8\"]\n    to: any\n    protocol: tcp\n    ports: [80, 443, \"8000-8100\", 70000]\n";
    println!("{}", parse("net.yaml", text, &Original::default()).unwrap_err());
    let bomb = "a: &a [x,x,x,x,x,x,x,x,x]\nb: &b [*a,*a,*a,*a,*a,*a,*a,*a,*a]\nc: &c [*b,*b,*b,*b,*b,*b,*b,*b]\nd: &d [*c,*c,*c,*c,*c,*c,*c]\ne: &e [*d,*d,*d,*d,*d,*d,*d]\nf: &f [*e,*e,*e,*e,*e,*e,*e]\ng: [*f,*f,*f,*f,*f]\n";
    println!("{}", parse("net.yaml", bomb, &Original::default()).unwrap_err());
    println!(
        "{}",
        parse(
            "net.yaml",
            "kind: Node\nkind: Node\n---\nkind: Foo\n---\na: [\n",
            &Original::default()
        )
        .unwrap_err()
    );
    println!(
        "{:?}",
        parse(
            "net.json",
            "[\n\t{\"kind\":\t\"Node\",\n\t\"metadata\": {\"name\": \"a\", \"labels\": {\"x\": \"\\u00e9\\/\"}}}]",
            &Original::default()
        )
    );
}
