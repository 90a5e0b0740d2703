"""Addresses that mean harm, for `test_hostile.py`."""

from __future__ import annotations

import base64

# ways to say this machine, its neighbours, and where clouds keep secrets
HOSTS = (
    '127.0.0.1', 'localhost', 'LOCALHOST', 'localhost.', '127.0.0.1.', '2130706433', '0x7f000001',
    '0x7f.0.0.1', '0177.0.0.1', '017700000001', '127.1', '127.0.1', '127.127.127.127', '0', '0.0.0.0',
    '[::1]', '[::]', '[0:0:0:0:0:0:0:1]', '[::ffff:127.0.0.1]', '[::ffff:7f00:1]', '[64:ff9b::7f00:1]',
    '[2002:7f00:1::]', '\u2460\u2461\u2466.\u24ea.\u24ea.\u2460', '\u24db\u24de\u24d2\u24d0\u24db\u24d7\u24de\u24e2\u24e3',
    '127\u30020\u30020\u30021', '%31%32%37.0.0.1', '127.0.0.1%00.public.example', 'ip6-localhost',
    '169.254.169.254', '[fe80::a9fe:a9fe]', '[fd00:ec2::254]', 'metadata.google.internal',
    '2852039166', '0xa9fea9fe', '10.0.0.1', '192.168.0.1', '172.16.0.1', '100.64.0.1', '224.0.0.1',
    'user:word@127.0.0.1', 'public.example@127.0.0.1', '127.0.0.1#@public.example',
    '127.0.0.1\\@public.example', 'public.example.127.0.0.1.nip.io',
)  # fmt: skip


def addresses(secret_port: int, open_port: int) -> list[str]:
    """What is not below any allowed place."""
    found = [f'http://{host}:{secret_port}/secret.png' for host in HOSTS]
    found += [f'http://{host}/open/a.png' for host in HOSTS[:40]]
    found += [f'HtTps://{host}:{secret_port}/open/' for host in HOSTS[:12]]
    root = f'127.0.0.1:{open_port}'
    found += [
        f'http://{root}/{path}'
        for path in (
            'secret', 'open-not/a', 'open/../secret', 'open/%2e%2e/secret', 'open/%252e%252e/secret',
            'open/..%2fsecret', 'open/..%5csecret', 'open/..\\secret', 'open/./../secret', 'Open/a.png',
            'open%00/../secret', '/secret', 'open/;/../../secret', '?open/a.png', '#/open/a.png',
        )
    ]  # fmt: skip
    found += [
        f'http://{root}/open/a.png\r\nHost: secret',
        f'http://{root}\r\n/open/a.png',
        f'http://{root}/open/a.png\n\nGET /secret',
        f'http://{root}:80/open/a.png',
        f'http://{root}.public.example/open/a.png',
        f'http://{root}@secret.example/open/a.png',
        f'https://{root}/open/a.png',
        'http:///open/a.png',
        'http:open/a.png',
        'http://',
        '//127.0.0.1/open/a.png',
        f'http://{"a" * 70_000}/',
        f'http://{"a." * 5_000}example/',
        'http://a..b/',
        'http://[::1/',
        f'http://{root[:-1]}x/',
        'http://127.0.0.1:99999/',
        'http://127.0.0.1:-1/',
    ]
    files = (
        '/etc/passwd', 'file:///etc/passwd', 'FILE:///etc/passwd', 'file:/etc/passwd', 'file:etc/passwd',
        'file://localhost/etc/passwd', 'file://127.0.0.1/etc/passwd', 'file:////etc/passwd',
        'file:///etc/%70asswd', '../../../../etc/passwd', '~/.ssh/id_rsa', '~root/.ssh/id_rsa',
        '/proc/self/environ', '/proc/self/mem', '/proc/self/fd/0', '/dev/zero', '/dev/random', '/dev/stdin',
        'file:///dev/zero', 'file:///proc/self/cmdline', '/etc/passwd\0.png', 'file:///etc/passwd%00.png',
        '\\\\host\\share', 'C:\\Windows\\win.ini', '', ' ', '.', '/', 'file:', 'file://', 'file:///', '\ud800',
    )  # fmt: skip
    schemes = (
        'ftp', 'gopher', 'dict', 'ldap', 'jar', 'netdoc', 's3', 'gs', 'ssh', 'sftp', 'smb', 'unix', 'php',
        'expect', 'blob', 'ws', 'javascript', 'view-source', 'chrome', 'httpx', 'http+unix', 'about',
    )  # fmt: skip
    found += files
    found += [f'{scheme}://127.0.0.1:{secret_port}/open/a.png' for scheme in schemes]
    return found


def redirects(secret_port: int, open_port: int) -> list[str]:
    """Allowed places that send on to others."""
    targets = [f'http://{host}:{secret_port}/secret.png' for host in HOSTS[:20]]
    targets += [
        '/secret', '../../../secret', '//127.0.0.1/secret', 'file:///etc/passwd', 'data:,picture',
        f'gopher://127.0.0.1:{secret_port}/', f'http://rebinding.example:{secret_port}/', '/open/to?/open/to?',
    ]  # fmt: skip
    return [f'http://127.0.0.1:{open_port}/open/to?{target}' for target in targets]


def inline(limit: int) -> list[str]:
    """Contents in the address itself that are none, or too many."""
    bomb = base64.b64encode(bytes(limit + 1)).decode()
    return [
        f'data:image/png;base64,{bomb}',
        'data:,' + 'a' * (limit + 1),
        'data:,' + '%41' * (limit * 2),
        'data:image/png;base64,====',
        'data:image/png;base64',
        'data:image/png;base64,\u2460',
        'data:text/html,<script>',
        'data:,',
    ]
